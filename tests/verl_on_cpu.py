"""Lets verl's own trainer run without a GPU, for tests and first tries: a platform, and transformers in place of vLLM.

verl loads it by VERL_USE_EXTERNAL_MODULES=verl_on_cpu,gbpo_verl. It is slow, and for one process.

    python tests/verl_on_cpu.py /tmp/digits     makes a tiny model, its prompts, a reward, and the options that they take
"""

import contextlib
import os
import sys
import types
from pathlib import Path

import ray
import torch
import verl.utils.distributed
from verl.plugin.platform import PlatformBase
from verl.plugin.platform.platform_manager import set_platform
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput


class NoDevice(types.ModuleType):
    """torch.cpu, with a do-nothing in place of each function that only accelerators have."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.cpu, name, lambda *args, **kwargs: 0)

    def mem_get_info(self):
        return 0, 0

    def get_device_name(self):
        return "CPU"


def returning(value):
    return lambda self, *args, **kwargs: value


class CPU(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = NoDevice("no_device")
    is_available = is_ipc_supported = returning(False)
    device_count, current_device = returning(1), returning("cpu")
    set_device = synchronize = set_allocator_settings = empty_cache = returning(None)
    profiler_start = profiler_stop = cudart = returning(None)
    manual_seed = manual_seed_all = lambda self, seed: torch.manual_seed(seed)
    get_device_capability = returning((None, None))
    communication_backend_name = returning("gloo")
    visible_devices_envvar = returning("NO_VISIBLE_DEVICES")
    nvtx_range = returning(contextlib.nullcontext())
    ray_resource_name = returning("GPU")  # of which Ray is told that there is one
    ray_noset_envvars = returning([])


def init_process_group(timeout_second=None, backend=None):
    """In place of verl's, which names a backend for the CPU and one for the device: here they are the same."""
    if not torch.distributed.is_initialized():
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        torch.distributed.init_process_group("gloo", rank=rank, world_size=size)


class Server:
    """Generates with transformers, one prompt at a time."""

    def __init__(self, path, config):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model, self.config, self.step = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config, 0

    def update_weights(self, weights, step):
        self.model.load_state_dict(weights, strict=False)
        self.step = step

    @torch.no_grad()
    def generate(self, prompt_ids, sampling_params, request_id, **_):
        temperature, tokens, logprobs = sampling_params["temperature"], list(prompt_ids), []
        for _ in range(self.config.response_length):
            rows = (self.model(torch.tensor([tokens])).logits[0, -1] / (temperature or 1)).log_softmax(-1)
            token = int(torch.multinomial(rows.exp(), 1)) if temperature else int(rows.argmax())
            tokens.append(token)
            logprobs.append(float(rows[token]))
            if token == self.model.config.eos_token_id:
                break
        return TokenOutput(token_ids=tokens[len(prompt_ids) :], log_probs=logprobs, stop_reason="completed",
                           extra_fields={"global_steps": self.step})  # fmt: skip

    def nothing(self, *args, **kwargs):
        pass

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = abort_all_requests = resume_generation = nothing


class Replica(RolloutReplica):
    async def launch_servers(self):
        name = f"transformers_server_{self.replica_rank}"
        self._server_handle = ray.remote(Server).options(name=name).remote(self.model_config.path, self.config)
        self._server_address, self.servers = "nowhere", [self._server_handle]


class Adapter(BaseRollout):
    """What the training process hands its weights to."""

    def __init__(self, config, model_config, device_mesh, replica_rank=-1):
        super().__init__(config, model_config, device_mesh)

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, global_steps=None, **_):
        await ray.get_actor("transformers_server_0").update_weights.remote(dict(weights), global_steps)


def register():
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    set_platform(CPU())
    verl.utils.distributed.initialize_global_process_group_ray = init_process_group
    _ROLLOUT_REGISTRY["transformers", "async"] = "verl_on_cpu.Adapter"
    RolloutReplicaRegistry.register("transformers", lambda: Replica)
    devices = EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=["cpu"])
    devices(FSDPEngineWithLMHead)  # verl's FSDP engine names the devices that it is for


def make_task(folder):
    """A tiny model, prompts such as "123=", and a reward, 1 for the answer 7. Returns verl's options for them."""
    import pandas
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(["<end>", "<pad>", *"0123456789="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    tokens = dict(vocab_size=len(vocabulary), bos_token_id=None, eos_token_id=0, pad_token_id=1, tie_word_embeddings=True)
    config = transformers.LlamaConfig(**sizes, **tokens)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    answer = {"reward_model": {"style": "rule", "ground_truth": "7"}, "data_source": "digits"}
    rows = [{"prompt": [{"role": "user", "content": f"{n:03}="}], "extra_info": {"index": n}} | answer for n in range(200)]
    pandas.DataFrame(rows).to_parquet(folder / "prompts.parquet")
    reward = "def compute_score(solution_str, ground_truth, **_):\n    return float(solution_str == ground_truth)\n"
    (folder / "reward.py").write_text(reward)
    return f"""
        trainer.device=cpu +ray_kwargs.ray_init.num_gpus=1 ray_kwargs.ray_init.num_cpus=32 trainer.n_gpus_per_node=1
        hydra.run.dir={folder}/outputs
        transfer_queue.backend.SimpleStorage.num_data_storage_units=1 reward.num_workers=1 trainer.logger=[console]
        data.train_files={folder}/prompts.parquet data.val_files={folder}/prompts.parquet data.train_batch_size=16
        data.max_prompt_length=8 data.max_response_length=1 reward.custom_reward_function.path={folder}/reward.py
        actor_rollout_ref.model.path={folder}/model +actor_rollout_ref.model.override_config.attn_implementation=eager
        actor_rollout_ref.model.use_remove_padding=False actor_rollout_ref.actor.use_torch_compile=False
        actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.fsdp_config.dtype=float32
        actor_rollout_ref.actor.fsdp_config.model_dtype=float32 actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
        actor_rollout_ref.actor.ppo_mini_batch_size=16 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=128
        actor_rollout_ref.actor.ppo_epochs=2 actor_rollout_ref.actor.optim.lr=5e-3 actor_rollout_ref.rollout.n=8
        actor_rollout_ref.rollout.name=transformers actor_rollout_ref.rollout.tensor_model_parallel_size=1
        actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=128 actor_rollout_ref.rollout.agent.num_workers=1
        trainer.total_training_steps=15 trainer.val_before_train=False trainer.test_freq=-1 trainer.save_freq=-1
    """.split()


if __name__ == "__main__":
    options = make_task(Path(sys.argv[1]).absolute())
    Path(sys.argv[1], "options").write_text("\n".join(options) + "\n")
else:
    register()

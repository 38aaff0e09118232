#!/usr/bin/env bash
# A quarter of an hour on a GPU: a walking G1 of mjlab, 4096 of it, with BPO, PPO and rsl_rl's PPO in turn; where Isaac Lab is
# installed its humanoid too; and, where transformers is, SmolLM2 in bfloat16 with several minibatches.
#
#     bash benchmark/lease.sh OUT                                                          each run's output and results go to OUT
#     DEVICE=cpu NUM_ENVS=8 ITERATIONS=2 BATCHES=1 bash benchmark/lease.sh OUT    a try on a CPU
#
# A run that fails, or takes longer than LIMIT seconds, does not stop the others. The last lines tell how each ended.
set -u
out=$(realpath "${1:?bash benchmark/lease.sh OUT}") root=$(realpath "$(dirname "$0")/..")
device=${DEVICE:-cuda} num_envs=${NUM_ENVS:-4096} iterations=${ITERATIONS:-100} batches=${BATCHES:-20} limit=${LIMIT:-110}
mkdir -p "$out" && cd "$out" || exit 1
has() { python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

run() {  # run NAME COMMAND…
    local name=$1 start=$SECONDS code
    shift
    timeout --signal=INT --kill-after=20 "$limit" "$@" > "$name.log" 2>&1
    code=$?
    echo "$name: exit status $code after $((SECONDS - start)) s: $(tail -n 1 "$name.log")" | tee -a summary.txt
}

ours() {  # ours NAME TASK STEPS LOSS, steps in each environment per rollout
    run "$1" python "$root/bpo_isaaclab.py" --task "$2" --loss "$4" --exp-name "$1" --device "$device" --num-envs "$num_envs" \
        --total-timesteps $((num_envs * $3 * iterations))
}

if has mjlab; then
    g1=Mjlab-Velocity-Flat-Unitree-G1
    for loss in bpo ppo; do ours "g1-$loss" "$g1" 24 "$loss"; done
    [ "$device" = cpu ] && gpus=None || gpus=0
    run g1-rsl_rl train "$g1" --env.scene.num-envs "$num_envs" --agent.max-iterations "$iterations" --agent.logger tensorboard \
        --gpu-ids "$gpus"
fi
if has isaaclab; then
    for loss in bpo ppo; do ours "humanoid-$loss" Isaac-Humanoid 32 "$loss"; done
    run humanoid-rsl_rl python "$root/benchmark/peer_rsl_rl.py" --task Isaac-Humanoid --device "$device" --num-envs "$num_envs" \
        --total-timesteps $((num_envs * 32 * iterations))
fi
if has transformers; then
    for loss in gbpo grpo; do
        run "smollm2-$loss" python "$root/gbpo_llm.py" --loss "$loss" --model-name smollm2 --task reasoning_gym/chain_sum --few-shot 4 \
            --max-new-tokens 6 --num-prompts 32 --num-minibatches 4 --learning-rate 1e-5 --total-batches "$batches"
    done
fi
cat summary.txt

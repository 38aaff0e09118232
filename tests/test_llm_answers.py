"""gbpo_llm.py: what a model writes is data. What counts of it, what it is worth, and that scoring it does no harm."""

import json
import math
import os
import time
from dataclasses import replace
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

pytest.importorskip("transformers", reason="gbpo_llm.py's own requirements, requirements-llm.txt, are not installed")

import reasoning_gym
from tokenizers.processors import TemplateProcessing

import gbpo_llm as gbpo

ARGS = gbpo.Args(**gbpo.SCRATCH | gbpo.LARGEST_DIGIT, epsilon_low=0.3, epsilon_high=0.3, num_prompts=2, eval_prompts=4)
MATH = gbpo.Task([], [], gbpo.math_score, gbpo.same_math)


@pytest.fixture(autouse=True)
def no_problems_yet():
    gbpo.PROBLEMS.clear()
    gbpo.SHOWN.clear()


def few_questions(patch):
    create = reasoning_gym.create_dataset
    patch.setattr(reasoning_gym, "create_dataset", lambda name, **settings: create(name, **{**settings, "size": 20}))


@pytest.fixture(scope="module")
def load():
    tasks = {}

    def load(name):
        if name not in tasks:
            with pytest.MonkeyPatch.context() as patch:
                few_questions(patch)
                tasks[name] = gbpo.load_task(replace(ARGS, task=f"reasoning_gym/{name}"))
        return tasks[name]

    return load


# What counts of an answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("<answer>so \\boxed{4}</answer>", "4"),
        ("<answer>\\boxed{\\frac{1}{2}}</answer> and \\boxed{9}", "\\frac{1}{2}"),
        ("\\boxed{1}\n<answer>2</answer>", "2"),
        ("<answer> $7$ </answer>", "7"),
        ("<think>\\boxed{5}</think> \\boxed{6}", "6"),
        ("<think>\\boxed{5}</think> 6", "6"),
        ("<think>a</think><think>5</think>6", "6"),
        ("it begins in the prompt: 5</think>\n6", "6"),
        ("\\boxed{6} <think>\\boxed{5}</think>", "6"),
        ("<think>\\boxed{5}", ""),
        ("\\boxed{6} <think> or", ""),
        ("<answer>6</answer> <think> or", ""),
        ("<think><answer>5</answer></think>", ""),
        ("<answer>5", ""),
        ("<answer>4</answer> no, <answer>5", ""),
        ("\\boxed{5", ""),
        ("\\boxed{4} and \\boxed{\\frac{1}{2}", ""),
        ("<answer>\\boxed{5</answer>", ""),
        ("\\boxed{\\text{mother-in-law}}", "mother-in-law"),
        ("\\boxed{\\mathrm{Monday}}", "Monday"),
        ("\\boxed{$\\textbf{ Monday }$}", "Monday"),
        ("\\boxed{\\text{a} + \\text{b}}", "\\text{a} + \\text{b}"),
        ("\\boxed{\\(x\\)}", "x"),
        ("$$x$$", "x"),
        ("$x$ or $y$", "$x$ or $y$"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\{ x : x > 1 } y", "\\{ x : x > 1"),
        ("\\boxed {3} \\fbox{4}", "4"),
        ("\\boxed{}", ""),
        ("", ""),
    ],
)
def test_what_counts_of_a_completion(completion, answer):
    assert gbpo.extract_answer(completion) == answer


# Mathematics ----------------------------------------------------------------------------------------------------------

SAME = [
    *(
        ("8", text)
        for text in ("8", "8.", "08", "8.0", "+8", "$8$", "\\(8\\)", "\\text{8}", "8 \\text{ apples}", "**8**", "16/2")
    ),
    *(("8", text) for text in ("The answer is 8.", "Answer: 8", "So 7 + 1 = 8.\n#### 8", "The answer is $8$.", "x = 8")),
    *(("8", text) for text in ("Final Answer: The final answer is 8. I hope it is correct.", "3 + 4 = 7. Then 7 + 1 = 8.")),
    *(
        ("1000", text)
        for text in ("1\\,000", "1{,}000", "1,000", "1,\\!000", "1 000", "1e3", "1E+3", "10^3", "1,000.0", "$1,000")
    ),
    *(("1234567.5", text) for text in ("1,234,567.50", "1\\,234\\,567.5", "1.2345675e6", "1.2345675 \\times 10^{6}")),
    *(("0.003", text) for text in ("3e-3", "3 \\times 10^{-3}", "3×10⁻³", "\\frac{3}{1\\,000}", "0.3%")),
    *(("2.5", text) for text in ("2 1/2", "2\\frac{1}{2}", "2\\frac12", "2 \\dfrac{1}{2}", "2½", "2 1/2 cups", "5/2", "250%")),
    *(("-2.5", text) for text in ("-2 1/2", "−2.5", "-\\frac{5}{2}", "\\frac{-5}{2}")),
    *(("\\frac{1}{2^{99}}", text) for text in ("1/2⁹⁹", "2^{-99}", "1/2^99", "\\frac{2}{2^{100}}")),
    *(("\\sqrt{8}", text) for text in ("2\\sqrt{2}", "2 sqrt(2)", "\\frac{4}{\\sqrt{2}}")),
    *(("50\\%", text) for text in ("50", "0.5", "1/2", "50 percent")),
    *(("1,2", text) for text in ("2, 1", "\\{1, 2\\}", "1.0, 4/2")),
    *(("(1,2)", text) for text in ("(1, 2)", "\\left(1, 2\\right)", "(1.0, \\frac{4}{2})")),
    *(("mother-in-law", text) for text in ("\\text{mother-in-law}", "Mother-in-law.", "$\\mathrm{mother-in-law}$")),
    ("[1, 2)", "[1,2)"),
    ("BCA", "\\text{BCA}"),
    ("\\text{(A)}", "A"),
    ("Monday, Tuesday", "Monday,Tuesday"),
    ("2xy + 1", "1 + 2yx"),
    ("0.5x", "\\frac{x}{2}"),
    ("x^2+1=0", "1+x^2=0"),
    ("2\\pi", "2 pi"),
    ("90^\\circ", "90°"),
    ("\\pm 2", "2, -2"),
    ("(-\\infty,1)\\cup(2,\\infty)", "(2,\\infty) \\cup (-\\infty,1)"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
]
DIFFERENT = [
    *(
        ("8", text)
        for text in ("First we get 3 + 4 = 7. Then 7 + 1 =", "7 + 1 =", "8 +", "8 \\times", "(8", "\\frac{8", "8,", "8 or")
    ),
    *(
        ("8", text)
        for text in ("The answer is", "The answer is 8 +", "So 18 - 10 = 8 eggs are left, and", "So 7 + 1 = 8 and then we")
    ),
    *(
        ("8", text)
        for text in (
            "1. Add 7 and 1\n2. Get 8",
            "We know x = 8 from",
            "3 + 4 = 7. Then 7 + 1 = 8. Next",
            "18 eggs",
            "7, 8",
            "78",
        )
    ),
    *(
        ("7", text)
        for text in ("First we get 3 + 4 = 7. Then 7 + 1 =", "First we get 3 + 4 = 7. Then 7 + 1 = 8.", "3 + 4 = 7. Then")
    ),
    *(("BCA", text) for text in ("ABC", "\\text{ABC}", "CAB", "B C A", "BC")),
    *(("A12", text) for text in ("12A", "A21")),
    *(("1,2", text) for text in ("(1,2)", "[1,2]", "(1, 2]", "1,2,3", "12", "1,1")),
    *(("(1,2)", text) for text in ("1,2", "(2,1)", "[1,2]")),
    *(("\\frac{1}{2^{99}}", text) for text in ("\\frac{1}{2^{98}}", "1/2⁹⁸", "0", "2^{-98}")),
    *(
        (f"{shape % '2^{-99}'}", shape % "2^{-98}")
        for shape in ("x + %s", "x = %s", "(1, %s)", "%s x", "\\{1, %s\\}", "\\sqrt{%s}")
    ),
    *(("1/3", text) for text in ("0.333333", "0.33333333333333333333", "0.3")),
    *(("\\sqrt{2}", text) for text in ("1.41421356", "1.4142135623730950488016887242096980785696718753769")),
    *(("0.0000001", text) for text in ("0.0000002", "0", "1e-8")),
    ("\\pi", "3.14159265358979"),
    ("123456789012345678901", "123456789012345678902"),
    ("10^{30}", "10^{30} + 1"),
    ("listen", "silent"),
    ("Monday, Tuesday", "Tuesday, Monday"),
    ("10.5", "2 1/2"),
    ("1000", "1e4"),
    ("8", "nan"),
    ("2", "1e999999999"),
    ("8", ""),
]


@pytest.mark.parametrize("gold, answer", SAME)
def test_answers_that_mean_the_same(gold, answer):
    assert gbpo.math_score(answer, {"answer": gold}) == 1
    assert gbpo.same_math(answer, gold)


@pytest.mark.parametrize("gold, answer", DIFFERENT)
def test_answers_that_do_not(gold, answer):
    assert gbpo.math_score(answer, {"answer": gold}) == 0
    assert not gbpo.same_math(answer, gold)


def test_any_of_several_answers_is_right_and_each_is_read_as_mathematics():
    score = lambda answer: gbpo.math_score(answer, {"answer": ["7", "\\frac{1}{2}", "two words"]})  # noqa: E731
    assert score("7.0") == score("0.5") == score("two words") == 1 and score("8") == score("") == 0


def test_letters_do_not_multiply_and_cut_off_text_has_no_voice_in_the_vote():
    rewards = lambda *answers: gbpo.group_rewards(answers, {}, MATH, replace(ARGS, reward="majority"))  # noqa: E731
    assert rewards("\\boxed{ABC}", "\\boxed{BCA}", "\\boxed{BCA}") == [0, 1, 1]
    assert rewards("Then 7 + 1 =", "Then 7 + 1 =", "\\boxed{8}") == [0, 0, 1]
    assert rewards("\\boxed{8", "\\boxed{8", "<think>8", "2 1/2", "\\boxed{5/2}") == [0, 0, 0, 1, 1]
    assert rewards("1/2^99", "1/2^98", "2^{-98}") == [0, 1, 1]
    assert rewards("(1,2)", "1,2", "2,1") == [0, 1, 1]


@pytest.mark.slow
def test_a_vote_that_would_never_end_does():
    start = time.time()
    towers = [f"9^{{9^{{9^{k}}}}}" for k in (8, 9)]
    rewards = gbpo.group_rewards([*towers, "x^2", "x \\cdot x"], {}, MATH, replace(ARGS, reward="majority"))
    assert rewards == [0, 0, 1, 1] and time.time() - start < 60 and gbpo.PROBLEMS["scorer_failures"] > 0


@pytest.mark.parametrize("text", ["1 " * 10000, "1 a " * 5000, "\\text{" * 2000 + "}" * 2000, "(" * 20000, "answer is " * 2000])
def test_no_text_takes_long_to_read(text):
    start = time.time()
    assert gbpo.math_score(gbpo.extract_answer(text), {"answer": "8"}) == 0 and time.time() - start < 2


# Scorers that run answers ---------------------------------------------------------------------------------------------

ATTACKS = [
    "exit()",
    "quit(0)",
    "__import__('os')._exit(0)",
    "(_ for _ in ()).throw(KeyboardInterrupt)",
    "(_ for _ in ()).throw(SystemExit(0))",
    "open('FOLDER/written', 'w').write('x')",
    "open('FOLDER/kept', 'a')",
    "open('FOLDER/kept', 'r+')",
    "__import__('os').open('FOLDER/written', 64)",
    "__import__('pathlib').Path('FOLDER/written').touch()",
    "__import__('os').mkdir('FOLDER/written')",
    "__import__('os').symlink('FOLDER/kept', 'FOLDER/written')",
    "__import__('os').rename('FOLDER/kept', 'FOLDER/written')",
    "__import__('os').remove('FOLDER/kept')",
    "__import__('os').truncate('FOLDER/kept', 0)",
    "__import__('os').chmod('FOLDER/kept', 0)",
    "__import__('shutil').rmtree('FOLDER')",
    "__import__('os').system('touch FOLDER/written')",
    "__import__('subprocess').run(['touch', 'FOLDER/written'])",
    "__import__('os').execv('/bin/touch', ['touch', 'FOLDER/written'])",
    "__import__('os').fork()",
    "__import__('threading').Thread(target=print).start()",
    "__import__('socket').create_server(('127.0.0.1', 0))",
    "__import__('socket').socketpair()",
    "__import__('os').kill(__import__('os').getppid(), 9)",
    "__import__('ctypes').string_at(0)",
    "__import__('ctypes').CDLL(None).unlink(b'FOLDER/kept')",
    "__import__('ctypes').CDLL(None).syscall(87, b'FOLDER/kept')",
    "[0] * 10**10",
    "'x' * 10**12",
    "__import__('os').write(1, b'[\"ok\", 1.0]')",
    "[__import__('os').write(fd, b'[\"ok\", 1.0]') for fd in range(64)]",
    "[[0]] + " * 3000 + "[[0]]",
    "(" * 3000,
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_answer_does_nothing_and_earns_nothing(attack, load, tmp_path):
    task = load("binary_matrix")
    example, kept = task.train[0], tmp_path / "kept"
    kept.write_text("kept")
    attack = attack.replace("FOLDER", str(tmp_path))
    rewards = gbpo.group_rewards([example["answer"], attack, example["answer"]], example, task, ARGS)
    assert rewards == [1, 0, 1]
    assert os.listdir(tmp_path) == ["kept"] and kept.read_text() == "kept" and kept.stat().st_mode & 0o600


@pytest.mark.parametrize("name", ["spiral_matrix", "binary_matrix", "string_insertion"])
def test_exit_is_a_wrong_answer_that_is_counted_and_named(name, load, capsys):
    task = load(name)
    assert gbpo.group_rewards(["\\boxed{exit()}", "quit()"], task.train[0], task, ARGS) == [0, 0]
    assert gbpo.PROBLEMS["scorer_failures"] == 2 and capsys.readouterr().out.count("SystemExit") == 1


@pytest.mark.slow
def test_an_answer_that_takes_for_ever_is_given_up_after_seconds_and_not_tried_twice(load):
    task, start = load("countdown"), time.time()
    rewards = gbpo.group_rewards(["9**9**9"] * 50 + [task.train[0]["answer"]], task.train[0], task, ARGS)
    assert rewards == [0] * 50 + [1] and 3 < time.time() - start < 30 and gbpo.PROBLEMS["scorer_failures"] == 50


def test_an_answer_changes_nothing_for_the_next_question(load):
    task = load("binary_matrix")
    poison = (
        "[setattr(__import__('reasoning_gym').algorithmic.binary_matrix.BinaryMatrixDataset, 'score_answer', lambda *a: 1.0)]"
    )
    gbpo.group_rewards([poison], task.train[0], task, ARGS)
    assert gbpo.group_rewards(["no"], task.train[1], task, ARGS) == [0]


def test_a_scoring_process_that_is_killed_is_replaced(load):
    task, example = load("binary_matrix"), load("binary_matrix").train[0]
    scorer = next(cell.cell_contents for cell in task.score.__closure__ if isinstance(cell.cell_contents, gbpo.Scorer))
    scorer.process.kill()
    scorer.process.wait()
    rewards = gbpo.group_rewards([example["answer"]] * 3, example, task, ARGS)
    assert rewards == [0, 1, 1] and gbpo.PROBLEMS["scorer_failures"] == 1


@pytest.mark.parametrize("answer", ["nan", "NaN", "-nan", "nan+nanj", "nanj", "nan + 3i", "48.0 + nani", "inf", "nan + infj"])
def test_nan_is_no_complex_number(answer, load):
    task = load("complex_arithmetic")
    assert gbpo.group_rewards([answer, task.train[0]["answer"]], task.train[0], task, ARGS) == [0, 1]


def test_without_seccomp_a_scorer_that_runs_answers_needs_the_user_s_word(monkeypatch):
    few_questions(monkeypatch)
    monkeypatch.setattr(gbpo, "WORKER", gbpo.WORKER.replace('sys.platform != "linux"', "True"))
    args = replace(ARGS, task="reasoning_gym/spiral_matrix")
    with pytest.raises(SystemExit, match="--allow-code"):
        gbpo.load_task(args)
    task = gbpo.load_task(replace(args, allow_code=True))
    assert gbpo.group_rewards(["exit()", task.train[0]["answer"]], task.train[0], task, ARGS) == [0, 1]
    assert gbpo.load_task(replace(args, task="reasoning_gym/chain_sum")).train  # compares text only


def test_a_worker_that_can_t_start_is_one_line(monkeypatch):
    monkeypatch.setattr(gbpo, "WORKER", gbpo.WORKER.replace("from math_verify", "from no_such_module"))
    with pytest.raises(SystemExit, match="no_such_module"):
        gbpo.Scorer("math")


# Rewards --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reward, kind",
    [(math.nan, "NaN"), (None, "None"), (math.inf, "infinite"), (-math.inf, "infinite"), (1e30, "huge"), (-(10**400), "huge")],
)
def test_a_bad_reward_is_named_counted_and_nothing(reward, kind, capsys):
    task = gbpo.Task([], [], lambda answer, example: reward if answer == "bad" else 0.5)
    assert gbpo.group_rewards(["bad", "good", "bad"], {}, task, ARGS) == [0, 0.5, 0]
    assert gbpo.PROBLEMS["bad_rewards"] == 2 and capsys.readouterr().out.count(kind) == 1


def test_a_bad_reward_of_one_s_own_leaves_no_nan_in_the_charts(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gbpo, "group_rewards", lambda completions, *rest: [math.nan, None, 1.0, math.inf] * 2)
    run_dir = gbpo.train(replace(ARGS, total_batches=2, eval_samples=8))
    events = EventAccumulator(str(run_dir)).Reload()
    values = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert values["charts/bad_rewards"] == [12, 12] and values["charts/reward"] == [0.25, 0.25]
    assert values["charts/scorer_failures"] == [0, 0] and all(math.isfinite(v) for chart in values.values() for v in chart)


# Files and prompts ----------------------------------------------------------------------------------------------------


def write(folder, problems, name="problems.jsonl"):
    lines = [problem if isinstance(problem, str) else json.dumps(problem) for problem in problems]
    (folder / name).write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]")
    return str(folder / name)


GOOD = [{"prompt": f"{i} + 1", "answer": i + 1} for i in range(20)]


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "1 + 1", "answer": None},
        {"prompt": None, "answer": 2},
        {"prompt": "1 + 1", "answer": [2, None]},
        {"prompt": "1 + 1", "answer": []},
        {"prompt": [], "answer": 2},
        {"prompt": [{"role": "user", "content": None}], "answer": 2},
        {"prompt": "1 + 1", "answer": {"a": 2}},
    ],
)
def test_null_is_refused_with_its_line(bad, tmp_path):
    for name, place in (("problems.jsonl", "line 4"), ("problems.json", "problem 3")):
        blank = [" "] if name.endswith("l") else []
        path = write(tmp_path, [GOOD[0], *blank, GOOD[1], bad, *GOOD[2:]], name)
        with pytest.raises(SystemExit, match=f"{name}, {place}:"):
            gbpo.load_task(replace(ARGS, task=path))


def tokenizer_of(task, template=None):
    _, tokenizer = gbpo.scratch_model(task)
    tokenizer.chat_template = template
    return tokenizer


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
MODEL = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace()))


def prompts_of(examples, tokenizer, shots=()):
    tokens = gbpo.tokenize_prompts(examples, shots, MODEL, tokenizer, replace(ARGS, instruction="IN A BOX"))
    return [tokenizer.decode(prompt) for prompt in tokens]


def test_chat_messages_are_used_as_they_are(tmp_path):
    chat = [{"role": "system", "content": "be\nbrief"}, {"role": "user", "content": "1 + 1: IN A BOX, tsunamistery"}]
    begun = [*chat, {"role": "assistant", "content": "It is"}]
    problems = [{"prompt": chat, "answer": [2, "two"]}, {"prompt": begun, "answer": "2"}, *GOOD]
    task = gbpo.load_task(replace(ARGS, task=write(tmp_path, problems), reward="majority"))
    assert len(task.train) == 22 and task.score("two", task.train[0]) == task.score("2.0", task.train[0]) == 1
    tokenizer = tokenizer_of(task, TEMPLATE)
    texts = prompts_of(task.train[:3], tokenizer)
    assert texts[0] == "system: be\nbrief\nuser: 1 + 1: IN A BOX, tsunamistery\nassistant:"
    assert texts[1].endswith("tsunamistery\nassistant: It is") and texts[2].endswith("user: 0 + 1 IN A BOX\nassistant:")
    assert prompts_of(task.train[2:3], tokenizer, task.train[:1])[0].endswith("IN A BOX, tsunamistery 2\n0 + 1")


def test_an_end_token_that_the_tokenizer_adds_does_not_end_the_prompt():
    task = gbpo.load_task(ARGS)
    tokenizer = tokenizer_of(task)
    plain = gbpo.tokenize_prompts(task.train[:3], (), MODEL, tokenizer, ARGS)
    special = [("<end>", 0), ("<pad>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A <end>", special_tokens=special)
    assert tokenizer("123=").input_ids[-1] == 0
    assert gbpo.tokenize_prompts(task.train[:3], (), MODEL, tokenizer, ARGS) == [[1, *prompt] for prompt in plain]
    written = gbpo.tokenize_prompts([{"prompt": "123=<end>"}], (), MODEL, tokenizer, ARGS)
    assert written[0][-1] == 0  # one that the prompt itself has stays


@pytest.mark.parametrize("task", ["../x.jsonl", "/tmp/x.jsonl", "./.x/y.json", "largest_digit", "..jsonl"])
def test_no_run_folder_is_hidden(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = gbpo.new_run_dir(replace(ARGS, task=task))
    assert run_dir.parent.name == "runs" and run_dir.is_dir() and run_dir.name[0].isalnum()

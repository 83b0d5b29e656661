"""The benchmark at tiny size on a CPU: what it writes, and how it treats methods that cannot run."""

import json

import pytest
import torch

from lcl_ds.bench import __main__ as bench
from lcl_ds.bench import data, measure, peers, runner, train, train_runner
from lcl_ds.bench import native as native_bench
from lcl_ds.bench.contrastive import ContrastiveCase
from lcl_ds.bench.losses import LossCase
from lcl_ds.bench.peers import EAGER, OURS, Method, UnavailableError
from lcl_ds.bench.table import milliseconds, open_console
from lcl_ds.flops import StepFlops, total
from lcl_ds.objectives import lcl
from tests.support.counting import flop_counter

CEILINGS = {"matmul_n": 8, "matmul_dtype": "float32", "matmul_tflops": 0.1, "copy_mb": 1, "copy_tb_per_s": 0.01}
LOSSES = ("losses", "--shape", "64,16,301", "--repeats", "2")


@pytest.fixture
def run_bench(tmp_path, monkeypatch):
    """Run the command without memory, and with given ceilings; returns exit code and JSON document."""
    monkeypatch.setattr(runner, "measure_ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setitem(measure.MATMUL_N, "cpu", 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*options):
        code = bench.main([*options, "--no_memory", "--json", str(tmp_path / "out" / "bench.json")])
        return code, json.loads((tmp_path / "out" / "bench.json").read_text())

    return run


def by_method(document):
    return {row["method"]: row for row in document["rows"]}


def failing(error):
    def loss(*_):
        raise error

    return Method(EAGER, lambda setting: loss)


def test_losses_writes_every_figure(run_bench, tmp_path, capsys):
    plots = tmp_path / "plots"
    options = ("--valid", "1.0,0.5", "--peers", "eager,torch chunked,liger-kernel", "--plots", str(plots))
    code, document = run_bench(*LOSSES, *options)
    assert code == 0
    assert document["complete"] is True
    assert document["command"].startswith("python -m lcl_ds.bench losses --shape 64,16,301")
    assert {"gpu", "driver", "cuda", "torch", "triton", "python", "cpu", "cores", "git_commit"} <= set(
        document["environment"]
    )
    assert document["ceilings"] == CEILINGS
    assert [(row["method"], row["valid_fraction"]) for row in document["rows"]] == [
        (name, valid) for valid in (1.0, 0.5) for name in (OURS, "liger-kernel", "torch chunked", EAGER)
    ]
    for row in document["rows"]:
        assert row["shape"] == {"N": 64, "H": 16, "V": 301}
        assert row["counted_labels"] == 64 * row["valid_fraction"]
        if row["method"] == "liger-kernel":
            assert (row["status"], row["reason"]) == ("unavailable", "needs a GPU")
            continue
        assert row["status"] == "ok"
        assert len(row["times_ms"]) == 2
        useful = 6 * row["counted_labels"] * 16 * 301
        assert row["useful_tflops"] == pytest.approx(useful / row["median_ms"] / 1e9)
        assert row["share_of_matmul"] == pytest.approx(row["floor_ms"] / row["median_ms"])
    ours, eager = (by_method(document)[name] for name in (OURS, EAGER))
    assert ours["loss"] == pytest.approx(eager["loss"], rel=1e-6)
    assert ours["ratio_to_ours"] == 1
    assert eager["ratio_to_ours"] == pytest.approx(eager["median_ms"] / ours["median_ms"])
    checked = document["rows"][0]
    assert set(checked["errors"]) == {"loss", "d_hidden", "d_weight"}
    assert max(checked["errors"].values()) < 1e-5
    assert {path.name for path in plots.iterdir()} == {"losses_time.png", "losses_share.png"}
    printed = capsys.readouterr().out
    assert "these are not GPU figures" in printed
    assert "needs a GPU" in printed


def test_contrastive_writes_every_figure(run_bench, tmp_path):
    plots = tmp_path / "plots"
    options = ("--shape", "48,16", "--repeats", "1", "--peers", "eager,memeff,inf-cl", "--plots", str(plots))
    code, document = run_bench("contrastive", *options)
    assert code == 0
    rows = by_method(document)
    assert rows[OURS]["loss"] == pytest.approx(rows[EAGER]["loss"], rel=1e-6)
    assert max(rows[OURS]["errors"].values()) < 1e-5
    assert rows[OURS]["useful_tflops"] == pytest.approx(8 * 48**2 * 16 / rows[OURS]["median_ms"] / 1e9)
    assert {rows[name]["reason"] for name in ("memeff", "inf-cl")} == {"needs a GPU"}
    assert [path.name for path in plots.iterdir()] == ["contrastive_share.png"]


def test_sigmoid_writes_every_figure(run_bench, tmp_path):
    options = (
        "--shape",
        "48,16",
        "--repeats",
        "1",
        "--peers",
        "eager,siglip-kernel",
        "--plots",
        str(tmp_path / "plots"),
    )
    code, document = run_bench("sigmoid", *options)
    assert code == 0
    rows = by_method(document)
    assert rows[OURS]["loss"] == pytest.approx(rows[EAGER]["loss"], rel=1e-6)
    assert max(rows[OURS]["errors"].values()) < 1e-5
    assert rows[OURS]["useful_tflops"] == pytest.approx(6 * 48**2 * 16 / rows[OURS]["median_ms"] / 1e9)
    assert rows["siglip-kernel"]["reason"] == "needs a GPU"
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["sigmoid_share.png"]


def test_a_run_goes_on_where_another_ended(run_bench, tmp_path, monkeypatch):
    run_bench(*LOSSES, "--valid", "1", "--peers", "")
    path = tmp_path / "out" / "bench.json"
    document = json.loads(path.read_text())
    first = document["rows"][0]
    document["rows"].append({**first, "method": EAGER, "status": "running", "reason": None})
    path.write_text(json.dumps(document))
    code, document = run_bench(*LOSSES, "--valid", "1", "--peers", "torch chunked,eager", "--resume")
    assert code == 0
    rows = by_method(document)
    assert len(document["rows"]) == 3
    assert rows[OURS]["times_ms"] == first["times_ms"]
    assert (rows[EAGER]["status"], rows[EAGER]["reason"]) == ("failed", runner.ENDED)
    assert rows["torch chunked"]["ratio_to_ours"] > 0


def test_on_a_gpu_each_method_runs_on_all_cases_before_the_next():
    names = [OURS, EAGER]
    cases = [LossCase((8, 8, 8), "bf16", "cuda", valid=valid) for valid in (1.0, 0.5)]
    record = runner.Record(None, {})
    table = [(case, [runner.row_of(record, case, name) for name in names]) for case in cases]
    order = [[(rows[0]["method"], case.valid) for case, rows in part] for part in runner.parts_of(table)]
    assert order == [[(OURS, 1.0), (OURS, 0.5)], [(EAGER, 1.0), (EAGER, 0.5)]]
    record.rows[0]["status"] = "ok"
    assert [len(part) for part in runner.parts_of(table)] == [1, 2]


def test_a_sweep_measures_memory_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(measure.MATMUL_N, "cpu", 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["contrastive", "--shape", "512,16", "--sweep", "256,512", "--peers", EAGER, "--repeats", "1"]
    assert bench.main([*arguments, "--json", str(tmp_path / "b.json"), "--plots", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [(row["shape"]["M"], row["timed"]) for row in rows] == [(512, True)] * 2 + [(256, False)] * 2
    assert all(("median_ms" in row) == row["timed"] for row in rows)
    # Beside other tensors of that size: the logits and the probabilities of both directions.
    assert next(row["peak_extra_mb"] for row in rows if row["method"] == EAGER) >= 3
    assert (tmp_path / "contrastive_memory.png").stat().st_size > 10_000
    assert "M 256" in capsys.readouterr().out


def test_methods_that_cannot_run_are_named(run_bench, monkeypatch):
    monkeypatch.setitem(peers.LOSSES, EAGER, failing(ValueError("no such tile\nand more")))
    missing = Method("quack", lambda setting: peers._import("no_such_peer.module", "no-such-peer"))
    monkeypatch.setitem(peers.LOSSES, "quack", missing)
    code, document = run_bench(*LOSSES, "--valid", "1", "--peers", "eager,quack")
    assert code == 0
    rows = by_method(document)
    assert rows[OURS]["status"] == "ok"
    assert (rows[EAGER]["status"], rows[EAGER]["reason"]) == ("failed", "ValueError: no such tile")
    assert (rows["quack"]["status"], rows["quack"]["reason"]) == ("unavailable", "not installed")


def test_a_loss_that_is_not_finite_is_null(run_bench, monkeypatch):
    method = Method(EAGER, lambda setting: lambda *inputs: peers.eager_losses(*inputs) * float("nan"))
    monkeypatch.setitem(peers.LOSSES, EAGER, method)
    _, document = run_bench(*LOSSES, "--valid", "1", "--peers", EAGER)
    assert by_method(document)[EAGER]["loss"] is None
    assert by_method(document)[EAGER]["errors"]["d_hidden"] is None


def test_inputs_that_do_not_fit_are_named(run_bench, monkeypatch):
    def refuse(case):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(LossCase, "inputs", refuse)
    code, document = run_bench(*LOSSES, "--valid", "1", "--peers", EAGER)
    assert code == 0
    assert [row["reason"] for row in document["rows"]] == ["inputs: out of memory"] * 2


@pytest.mark.parametrize(
    ("value", "text"), [(0.012344, "0.01234"), (12.344, "12.34"), (999.96, "1000"), (10104.2, "10,104"), (None, "-")]
)
def test_times_are_written_without_an_exponent(value, text):
    assert milliseconds(value) == text


def test_an_interrupted_run_keeps_what_it_has(run_bench, monkeypatch, capsys):
    calls = []

    def loss(*inputs):
        calls.append(len(calls))
        if len(calls) > 4:  # two rounds and warm-up, then the errors, are the first case's
            raise KeyboardInterrupt
        return peers.eager_losses(*inputs)

    monkeypatch.setitem(peers.LOSSES, EAGER, Method(EAGER, lambda setting: loss))
    code, document = run_bench(*LOSSES, "--valid", "1,0.5", "--peers", EAGER)
    assert code == 130
    assert document["complete"] is False
    assert [row["status"] for row in document["rows"]] == ["ok", "ok", "pending", "pending"]
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("losses", "--shape", "1,2"), "--shape 1,2: must be N,H,V"),
        (("losses", "--shape", "1,2,x"), "--shape 1,2,x"),
        (("losses", "--shape", "1,2,0"), "--shape 1,2,0"),
        (("losses", "--valid", "0.5,1.5"), "--valid 0.5,1.5"),
        (("losses", "--peers", "eager,leger-kernel"), "leger-kernel is none of lcl_kernels, "),
        (("losses", "--repeats", "0"), "--repeats 0"),
        (("losses", "--workspace_mb", "-1"), "--workspace_mb -1"),
        (("contrastive", "--shape", "1,2,3"), "--shape 1,2,3: must be M,D"),
        (("contrastive", "--sweep", "8,a"), "--sweep 8,a"),
        (("contrastive", "--json", "/proc/no/bench.json"), "--json: "),
    ],
)
def test_mistakes_end_with_code_2(options, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "new_record", lambda *_: pytest.fail("it began to measure"))
    assert bench.main(list(options)) == 2
    assert message in capsys.readouterr().err


def test_argparse_ends_with_code_2_too():
    with pytest.raises(SystemExit, match="2"):
        bench.main(["loss"])


def allocate(megabytes):
    torch.ones(2**18)  # starts the threads
    return measure.cpu_peak_extra_bytes(lambda: torch.ones(megabytes * 2**18))


def test_memory_sees_a_known_allocation():
    assert measure.in_fresh_process(allocate, 96) / measure.MB == pytest.approx(96, abs=3)


def test_memory_of_eager_is_its_logits():
    case = LossCase((256, 16, 20_000), "fp32", "cpu")
    logits = 256 * 20_000 * 4
    # Backward holds the log-probabilities, their gradient and that of the logits.
    assert 2 * logits <= measure.in_fresh_process(runner.peak_of_step, case, EAGER) <= 3.5 * logits


def test_a_failure_in_the_fresh_process_is_reported():
    with pytest.raises(RuntimeError, match="UnavailableError: needs a GPU"):
        measure.in_fresh_process(runner.peak_of_step, LossCase((8, 8, 8), "fp32", "cpu"), "liger-kernel")


def test_methods_take_turns_and_failures_drop_out():
    order = []

    def call(name):
        order.append(name)
        if name == "b" and len(order) > 2:
            raise ValueError("second call")

    calls = {name: (lambda name=name: call(name)) for name in "ab"}
    times = measure.time_calls(calls, torch.device("cpu"), 2)
    assert "".join(order) == "ababa"
    assert len(times["a"]) == 2
    assert isinstance(times["b"], ValueError)


def test_slow_methods_are_timed_once_and_never_while_they_compile(monkeypatch):
    monkeypatch.setattr(measure, "CPU_SLOW_S", 0.0)
    calls = {"a": lambda: None, "b": lambda: None}
    counted = []
    monkeypatch.setattr(measure, "seconds_of", lambda call, device: counted.append(call) or float(len(counted)))
    assert measure.time_calls(calls, torch.device("cpu"), 3, compiling=["b"]) == {"a": [1.0], "b": [3.0]}


@pytest.mark.parametrize(
    "case",
    [
        LossCase((512, 128, 4000), "fp32", "cpu", valid=0.5),
        ContrastiveCase((512, 128), "fp32", "cpu", scale=14.3),
        ContrastiveCase((512, 512), "fp32", "cpu", scale=100.0),
    ],
    ids=lambda case: case.title,
)
def test_the_data_gives_a_loss_near_three(case):
    inputs = case.inputs()
    assert float(case.truth(*inputs).detach()) == pytest.approx(3, abs=0.7)
    for one, other in zip(inputs, case.inputs(), strict=True):
        assert torch.equal(one, other)


def test_adapters_refuse_shapes_that_a_peer_cannot_take(monkeypatch):
    monkeypatch.setattr(peers, "_import", lambda *_: peers)
    monkeypatch.setattr(peers, "chunked_linear_cross_entropy", None, raising=False)
    monkeypatch.setattr(peers, "MemoryEfficientCLIPLoss", None, raising=False)
    monkeypatch.setattr(peers, "cal_flash_loss", None, raising=False)
    with pytest.raises(UnavailableError, match="multiples of 8"):
        peers.LOSSES["quack"].function(peers.Setting((8192, 768, 49411), "bf16", "cuda"))
    assert peers.LOSSES["quack"].function(peers.Setting((8192, 768, 49408), "bf16", "cuda"))
    with pytest.raises(UnavailableError, match="V of 256"):
        peers.LOSSES["liger-kernel sm90"].function(peers.Setting((8192, 768, 49411), "bf16", "cuda"))
    with pytest.raises(UnavailableError, match="power of two"):
        peers.CONTRASTIVE["memeff"].function(peers.Setting((64, 48), "bf16", "cuda"))
    with pytest.raises(UnavailableError, match="multiple of 16"):
        peers.CONTRASTIVE["inf-cl"].function(peers.Setting((64, 100), "bf16", "cuda"))


TINY = ("--rows", "2", "--context", "128", "--row_tokens", "128", "--vocab_size", "301", "--image_size", "64")
TINY_TOWERS = ("--width", "64", "--layers", "1", "--vision_width", "64", "--vision_layers", "1")


def test_train_compares_equal_steps_and_writes_every_figure(run_bench, capsys):
    code, document = run_bench("train", *TINY, *TINY_TOWERS, "--repeats", "2")
    assert code == 0
    assert document["complete"] is True
    rows = document["rows"]
    names = ["lcl_ds", "lcl_ds, padded", "published", "published, is_causal"]
    assert [(row["kind"], row["method"]) for row in rows] == [(k, n) for k in ("documents", "pairs") for n in names]
    for row in rows:
        assert (row["status"], len(row["times_ms"])) == ("ok", 2)
        assert row["shape"] | {"width": 64, "context": 128, "rows": 2} == row["shape"]
        assert row["tokens"] == row["rows"] * 128
        assert row["padding_fraction"] == pytest.approx(1 - row["useful_tokens"] / row["tokens"])
        assert row["useful_tokens_per_s"] == pytest.approx(1e3 * row["useful_tokens"] / row["median_ms"])
        assert row["errors"]["loss"] < 1e-6
        assert row["errors"]["gradient"] < 1e-5
    for ours, *others in (rows[:4], rows[4:]):
        assert ours["rows"] == 2
        for other in others:
            assert other["rows"] == other["documents"] == ours["documents"]
            assert other["useful_tokens"] == ours["useful_tokens"]
            assert other["loss"] == pytest.approx(ours["loss"], rel=1e-6)
            assert other["ratio_to_ours"] == pytest.approx(other["median_ms"] / ours["median_ms"])
            assert other["flops_ratio_to_ours"] == pytest.approx(other["flops"] / ours["flops"])
    assert rows[6]["padding_fraction"] > 0.5 > 0.05 >= rows[4]["padding_fraction"]
    assert "published, is_causal" in capsys.readouterr().out


def test_the_arithmetic_of_the_published_layout_is_what_torch_counts():
    towers = {"width": 64, "layers": 2, "vision_width": 64, "vision_layers": 2, "vocab_size": 301, "image_size": 64}
    case = train.TrainCase("pairs", 2, "fp32", "cpu", context=128, row_tokens=128, **towers)
    model, batch = case.model(), case.batch(packed=False)
    with flop_counter() as counter:
        train.loss_of(train.PUBLISHED, model, batch)().backward()
    flops = StepFlops(lcl.Objective(model, lcl.Settings())).of(train_runner.work_of(train.PUBLISHED, batch))
    assert total(flops).computed == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_published_layout_holds_its_logits():
    towers = {"width": 64, "layers": 1, "vision_width": 64, "vision_layers": 1}
    case = train.TrainCase("documents", 1, "fp32", "cpu", context=512, row_tokens=512, **towers)
    labels = len(case.batch(packed=False).labels)
    logits = 4 * labels * case.vocab_size
    ours, published = (
        measure.in_fresh_process(train_runner.peak_of_step, case, name) for name in (train.OURS, train.PUBLISHED)
    )
    assert published - ours > logits


def test_train_draws_full_rows_of_whole_documents():
    for case in train.train_cases("cpu", "fp32"):
        rows = case.packed_rows()
        assert len(rows) == case.rows
        for row in rows:
            lengths = [len(sequence.tokens.input_ids) for sequence in row.sequences]
            assert train.FULL * case.row_tokens <= sum(lengths) <= case.row_tokens
            assert max(lengths) <= case.context
        again = [sequence.tokens.input_ids for row in case.packed_rows() for sequence in row.sequences]
        ids = [sequence.tokens.input_ids for row in rows for sequence in row.sequences]
        assert all((one == other).all() for one, other in zip(ids, again, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--width", "0"), "--width 0: must be 1 or more"),
        (("--repeats", "0"), "--repeats 0"),
        (("--rows", "1", "--row_tokens", "100000"), "--rows 1: 0 rows of 100000 tokens became full"),
    ],
)
def test_mistakes_in_train_end_with_code_2(options, message, capsys):
    assert bench.main(["train", "--kind", "pairs", "--no_memory", *options]) == 2
    assert message in capsys.readouterr().err


def test_data_compares_loading_and_packing(tmp_path, demo_folder, capsys, monkeypatch):
    monkeypatch.setattr(native_bench, "WIDTH", 64)
    monkeypatch.setattr(native_bench, "LAYERS", 1)
    shards = f"data.shards={demo_folder}/train-*.tar", f"data.tokenizer={demo_folder}/tokenizer"
    figures = data.measure_data(tmp_path, 8, 2000, 1, seed=0, overrides=["data.demo=null", *shards])
    data.show_data(open_console(), figures)
    assert figures["loading"]["lcl_ds"]["ours_is_faster_by"] == 1
    assert len(figures["loading"]) == 3
    assert figures["demo"]["loader_images_per_s"] > 0
    for corpus in figures["packing"]:
        ours, greedy, padded = corpus["layouts"].values()
        assert ours["padding"] < 0.02 < greedy["padding"] < padded["padding"]
        assert ours["images_max_over_mean"] < 1.1 < greedy["images_max_over_mean"]
    native = figures["native"]
    assert native["rows"]["shapes"] == len(native_bench.ASPECTS) == 10
    assert native["rows"]["padding"] < 0.02
    packed, cropped, padded, showing = native["tower"]
    assert (packed["padding"], cropped["padding"]) == (0, 0)
    assert cropped["tokens_per_image"] == padded["tokens_per_image"] == 196 >= packed["tokens_per_image"] > 180
    assert 0.3 < padded["padding"] < 0.5
    assert showing["tokens_per_image"] * (1 - showing["padding"]) >= packed["tokens_per_image"]
    assert all(row["images_per_s"] > 0 for row in native["tower"])
    printed = capsys.readouterr().out
    assert "MMC4-like" in printed
    assert "padded squares that show as much" in printed


def test_resident_memory_is_followed(tmp_path, demo_folder):
    shards = f"data.shards={demo_folder}/train-*.tar", f"data.tokenizer={demo_folder}/tokenizer"
    taken = data.resident_memory(600, 100, ["data.demo=null", *shards])
    assert 3 <= len(taken) <= 6
    assert all(50 < mib < 10_000 for _, mib in taken)
    assert data.draw_memory(taken, tmp_path).stat().st_size > 1000


def test_mistakes_in_data_end_with_code_2(capsys):
    assert bench.main(["data", "--documents", "5"]) == 2
    assert "--documents 5: must be 2000 or more" in capsys.readouterr().err

"""Models of transformers, trained here and loaded by PEFT; the command that does it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_models import (
    CAUSAL,
    FAMILIES,
    SIZE,
    WORDS,
    metrics_of,
    write_e2e,
    write_model,
    write_reviews,
    write_vit,
)
from torch import Tensor, nn

from lora_analysis.cli import group
from lora_analysis.errors import InputError, MalformedFileError, MissingExtraError
from lora_analysis.formats import read_adapter
from lora_analysis.lora import add_lora, load_adapter_into, merge_lora
from lora_analysis.training import RunConfig, RunEvent, train_run

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

LOOP = {"steps": 6, "batch_size": 8, "lr": 0.02, "evaluations": 1, "checkpoint_every": 0}
TOKENS = torch.arange(24).reshape(2, 12) % (SIZE - 5) + 5
TOKENS[:, -1] = 3  # T5 classifies by the end of the text


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny models by family, each written when it is first asked for."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("data") / "reviews.csv")


def base_of(models: Path, family: str) -> str:
    folder = models / family
    if not folder.exists():
        (write_vit(folder) if family == "vit" else write_model(folder, family))
    return str(folder)


def trained(
    models: Path, family: str, data: Path, folder: Path, **more: Any
) -> tuple[Path, list[str]]:
    table = {
        "base": {"source": base_of(models, family)},
        "data": {"source": str(data), **more.pop("options", {})},
        "rank": 3,
        "alpha": 6.0,
        "loop": LOOP,
        **more,
    }
    notes: list[str] = []

    def watch(event: RunEvent) -> None:
        if event.note:
            notes.append(event.note)

    config = RunConfig.from_dict(table)
    return train_run(config, folder, device="cpu", on_event=watch), notes


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits  # type: ignore[no-any-return]


def with_peft(models: Path, family: str, run: Path, kind: str, **options: Any) -> Any:
    import transformers
    from peft import PeftModel

    torch.manual_seed(99)  # a fresh head is replaced by the adapter's
    base = getattr(transformers, kind).from_pretrained(base_of(models, family), **options)
    base.config.pad_token_id = 0
    return PeftModel.from_pretrained(base, run)


def with_us(models: Path, family: str, run: Path, kind: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(98)
    base = getattr(transformers, kind).from_pretrained(base_of(models, family), **options)
    base.config.pad_token_id = 0
    load_adapter_into(base, read_adapter(run))
    return base


SEQ, LM = "AutoModelForSequenceClassification", "AutoModelForCausalLM"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_of_every_family_is_loaded_by_peft_with_equal_logits(
    family: str, models: Path, reviews: Path, tmp_path: Path
) -> None:
    run, _ = trained(models, family, reviews, tmp_path / "run")
    adapter = read_adapter(run)
    blocks = [name for name in adapter if any(part.isdecimal() for part in name.split("."))]
    assert len(blocks) == len(adapter) >= 8  # all linear layers of two blocks, and no other
    assert adapter.config["task_type"] == "SEQ_CLS"
    assert adapter.saved_modules  # the fresh head
    foreign = with_peft(models, family, run, SEQ, num_labels=2)
    ours = with_us(models, family, run, SEQ, num_labels=2)
    torch.testing.assert_close(logits(foreign), logits(ours), rtol=1e-5, atol=1e-5)
    if family not in ("deberta-v3", "roberta"):  # PEFT wraps heads of several modules otherwise
        merged = foreign.merge_and_unload()
        merge_lora(ours)
        torch.testing.assert_close(logits(merged), logits(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_language_model_of_every_family_is_loaded_by_peft_with_equal_logits(
    family: str, models: Path, tmp_path: Path
) -> None:
    import transformers

    data = write_e2e(tmp_path / "e2e.txt")
    run, _ = trained(models, family, data, tmp_path / "run", options={"format": "e2e"})
    foreign, ours = (with_peft(models, family, run, LM), with_us(models, family, run, LM))
    base = transformers.AutoModelForCausalLM.from_pretrained(base_of(models, family))
    torch.testing.assert_close(logits(foreign), logits(ours), rtol=1e-5, atol=1e-5)
    assert (logits(ours) - logits(base)).abs().max() > 1e-2
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data"]["objective"] == "causal-lm"
    assert manifest["metrics"]["test_loss"] < manifest["metrics"]["base_test_loss"]


def test_the_loss_is_taken_on_completions_alone(models: Path, tmp_path: Path) -> None:
    from lora_analysis.training.run_setup import set_up_run
    from lora_analysis.training.tasks import NO_TARGET

    data = write_e2e(tmp_path / "e2e.txt")
    table = {
        "base": {"source": base_of(models, "llama")},
        "data": {"source": str(data), "format": "e2e"},
    }
    task = set_up_run(RunConfig.from_dict(table), torch.device("cpu")).task
    batch = task.training_batch(torch.tensor([0, 1]), torch.Generator())
    prompt = batch["labels"] == NO_TARGET
    assert prompt[:, :5].all()  # price X eat Y ||
    assert not prompt[:, 5:].any()
    assert (batch["labels"][~prompt] == batch["input_ids"][~prompt]).all()
    assert (batch["input_ids"][:, -1] == 3).all()  # the end of the text is learned


def test_the_loss_of_a_language_model_is_transformers_own(models: Path, tmp_path: Path) -> None:
    import transformers

    data = tmp_path / "plain.txt"
    data.write_text("the food was good\n\nthe film was very dull and poor\n\nbad plot\n")
    run, _ = trained(models, "gpt2", data, tmp_path / "run", objective="causal-lm")
    model = transformers.AutoModelForCausalLM.from_pretrained(base_of(models, "gpt2"))
    manifest = json.loads((run / "manifest.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_of(models, "gpt2"))
    losses = []
    for text in data.read_text().split("\n\n"):
        ids = torch.tensor([[*tokenizer(text.strip()).input_ids, 3]])
        losses.append(model.eval()(ids, labels=ids).loss.item())
    assert min(abs(manifest["metrics"]["base_test_loss"] - loss) for loss in losses) < 1e-5


def test_masked_tokens_are_found_again(models: Path, tmp_path: Path) -> None:
    data = tmp_path / "plain.txt"
    data.write_text("\n\n".join(f"the {w} was very good and fine" for w in ("food", "film") * 9))
    run, _ = trained(
        models, "bert", data, tmp_path / "run", objective="masked-lm", loop={**LOOP, "steps": 30}
    )
    metrics = json.loads((run / "manifest.json").read_text())["metrics"]
    assert metrics["test_loss"] < metrics["base_test_loss"]


def test_a_number_is_learned_by_regression(models: Path, tmp_path: Path) -> None:
    lines = ["text,label"]
    for number in range(60):
        good = number % 2
        rest = " ".join(WORDS[10 + number // 2 % 8 : 14 + number // 2 % 8])
        lines.append(f"{'good' if good else 'bad'} {rest},{good}.5")
    (tmp_path / "scores.csv").write_text("\n".join(lines))
    loop = {**LOOP, "steps": 60}
    run, _ = trained(
        models,
        "llama",
        tmp_path / "scores.csv",
        tmp_path / "run",
        loop=loop,
        options={"test_share": 0.4},
    )
    metrics = json.loads((run / "manifest.json").read_text())["metrics"]
    # Labels of 0.5 and 1.5 have variance 1/4, the loss of their mean: at least half is explained.
    assert metrics["correlation"] > math.sqrt(0.5)  # 3.4 standard deviations of chance, 1/√(24 - 1)
    assert metrics["test_loss"] < 0.25 / 2 < metrics["base_test_loss"]


def test_images_in_files_are_classified(models: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    lines = ["image,label"]
    for number in range(24):
        shade = 230 if number % 2 else 20
        image.new("RGB", (8, 8), (shade, number, shade)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{'light' if number % 2 else 'dark'}")
    (tmp_path / "images.csv").write_text("\n".join([*lines, "nowhere.png,dark"]))
    run, notes = trained(models, "vit", tmp_path / "images.csv", tmp_path / "run")
    assert "1 of" in notes[0]
    assert "nowhere.png" in notes[0]
    kind, head = "AutoModelForImageClassification", {"num_labels": 2}
    resized = {"ignore_mismatched_sizes": True, **head}
    foreign = with_peft(models, "vit", run, kind, **resized).eval()
    ours = with_us(models, "vit", run, kind, **resized).eval()
    pixels = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(foreign(pixels).logits, ours(pixels).logits)


def test_a_fresh_head_depends_on_the_seed_alone(
    models: Path, reviews: Path, tmp_path: Path
) -> None:
    heads = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        still = {**LOOP, "steps": 1, "lr": 1e-12, "warmup_steps": 0}
        run, _ = trained(
            models, "bert", reviews, tmp_path / str(number), seed={"init": seed}, loop=still
        )
        heads.append(read_adapter(run).saved_modules["classifier.weight"])
    assert (heads[0] == heads[1]).all()
    assert abs(heads[0] - heads[2]).max() > 1e-3


def test_gradient_checkpointing_changes_nothing_but_memory(
    models: Path, reviews: Path, tmp_path: Path
) -> None:
    losses = []
    for checkpointing in (False, True):
        loop = {**LOOP, "gradient_checkpointing": checkpointing}
        run, _ = trained(
            models, "llama", reviews, tmp_path / str(checkpointing), loop=loop, dropout=0.1
        )
        losses.append([line["loss"] for line in metrics_of(run)[1:]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_full_fine_tune_is_a_model_that_transformers_loads(
    models: Path, reviews: Path, tmp_path: Path
) -> None:
    import transformers

    run, _ = trained(models, "bert", reviews, tmp_path / "run", method="full")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run)
    assert model.config.id2label == {0: "neg", 1: "pos"}


BFLOAT16 = 2.0**-8  # the largest relative error of one rounding: 8 significant bits


@dataclass
class Call:
    """What one adapted layer of a ``PeftModel`` was given, what its base gave, and the sum."""

    x: Tensor
    base: Tensor
    h: Tensor


def calls_of_adapted_layers(model: Any) -> tuple[Tensor, dict[str, Call]]:
    """Return the logits of a ``PeftModel`` and, by name, the call of each adapted layer."""
    base_outputs: dict[str, Tensor] = {}
    calls: dict[str, Call] = {}
    hooks = []

    def keep_base(name: str, h: Tensor) -> None:
        base_outputs[name] = h.clone()

    def keep_call(name: str, x: Tensor, h: Tensor) -> None:
        calls[name] = Call(x.clone(), base_outputs[name], h.clone())

    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            on_base = module.base_layer.register_forward_hook
            hooks.append(on_base(lambda _, __, h, name=name: keep_base(name, h)))
            on_layer = module.register_forward_hook
            hooks.append(on_layer(lambda _, inputs, h, name=name: keep_call(name, inputs[0], h)))
    result = logits(model)
    for hook in hooks:
        hook.remove()
    return result, calls


def assert_same_update(layer: Any, call: Call) -> None:
    """Compare what ``layer`` adds to its base with what PEFT adds, for the same input.

    Both compute ΔWx in float32 and add it to a Wx in bfloat16. Here the sum is rounded (u|h|);
    PEFT rounds ΔWx as well (u|ΔWx| + u|h|). Wx is subtracted from both, since processors with
    AVX-512 BF16 have another kernel for it. The factor 1 + 4u covers u² and float32.
    """
    with torch.no_grad():
        base, h = layer.base_layer(call.x).double(), layer(call.x).double()
        update = layer.update(call.x, layer.adapters[layer.active]).double().abs()
    theirs = call.h.double() - call.base.double()
    bound = BFLOAT16 * (h.abs() + call.h.double().abs() + update) * (1 + 4 * BFLOAT16)
    assert ((h - base - theirs).abs() <= bound + 1e-6).all()


def int8_rounding(calls: dict[str, Call]) -> float:
    """Return the relative rms difference that int8 codes of activations make between two runs.

    bitsandbytes rounds each row x of a layer's input to codes of step max|x|/127; the weights'
    codes are the same in both runs. Inputs that differ in a last bit get other codes near a half.
    At worst the two errors of rounding are independent, each of variance step²/12: relative to
    the row's mean square, 2·crest²/(12·127²) with crest = max|x|/rms(x). Layers with one input
    (q, k, v; gate, up) share its codes; the variances of different inputs add up.
    """
    variance = 0.0
    for name, call in calls.items():
        if name.endswith(("q_proj", "o_proj", "up_proj", "down_proj")):
            rows = call.x.double().flatten(0, -2)
            peaks, mean_squares = rows.abs().amax(-1).square(), rows.square().mean(-1)
            variance += 2 * float(peaks.sum() / mean_squares.sum()) / (12 * 127**2)
    return math.sqrt(variance)


def rounding_of_two_runs(codes: float) -> float:
    """Return a bound for the relative difference of the logits of two bfloat16 runs of a llama.

    A value on its way through a block is rounded to bfloat16 30 times: by two norms (4), four
    layers (each the weight's decoding, Wx, ΔWx and h: 16), the rotation of q (3), scores, softmax
    and their product with v (3), the activation and its product (2) and two sums; then by the last
    norm and the head (3). Each rounding is uniform within ±u at most, of variance u²/3, in each
    run, and the variances add up. Where both factors of a product carry an error (scores and v,
    gate and up), it doubles at most: the factor 2.
    """
    roundings = 2 * 30 + 3
    return 2 * math.sqrt(2 * roundings * BFLOAT16**2 / 3 + codes**2)


@pytest.mark.parametrize("quantized", ["nf4", "int8"])
def test_an_adapter_of_a_quantized_base_is_loaded_by_peft_on_that_base(
    quantized: str, models: Path, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    from lora_analysis.errors import UnsupportedMethodError
    from lora_analysis.training.run_setup import set_up_run

    data = write_e2e(tmp_path / "e2e.txt")
    base = {"source": base_of(models, "llama-wide"), "quantized": quantized, "dtype": "bfloat16"}
    run, _ = trained(
        models, "llama-wide", data, tmp_path / "run", options={"format": "e2e"}, base=base
    )
    metrics = json.loads((run / "manifest.json").read_text())["metrics"]
    assert metrics["test_loss"] < metrics["base_test_loss"]
    bits = {"load_in_8bit": True} if quantized == "int8" else {"load_in_4bit": True}
    if quantized == "nf4":
        bits |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        bits |= {"bnb_4bit_compute_dtype": torch.bfloat16}
    options = {"quantization_config": BitsAndBytesConfig(**bits), "dtype": torch.bfloat16}
    foreign = with_peft(models, "llama-wide", run, LM, **options)
    ours = with_us(models, "llama-wide", run, LM, **options)
    expected, calls = calls_of_adapted_layers(foreign)
    assert len(calls) == 2 * 7  # q, k, v, o, gate, up and down of two blocks
    layers = dict(ours.named_modules())
    for name, call in calls.items():
        assert_same_update(layers[name], call)
    expected = expected.float()
    bound = rounding_of_two_runs(int8_rounding(calls) if quantized == "int8" else 0.0)
    bound *= float(expected.norm())
    assert (logits(ours).float() - expected).norm() < bound
    with foreign.disable_adapter():  # the bound would see a run without the adapter
        assert (logits(foreign).float() - expected).norm() > 3 * bound
    with pytest.raises(UnsupportedMethodError, match="nothing can be merged into it"):
        merge_lora(ours)
    table = {"base": base, "data": {"source": str(data), "format": "e2e"}}
    model = set_up_run(RunConfig.from_dict(table), torch.device("cpu")).model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("quantized", ["nf4", "int8"])
def test_layers_that_a_quantized_base_does_not_hold_are_not_quantized(
    quantized: str, models: Path, reviews: Path, tmp_path: Path
) -> None:
    # A masked language model has no pooler: it is drawn, and trained with the classifier.
    base = {"source": base_of(models, "bert"), "quantized": quantized}
    run, _ = trained(models, "bert", reviews, tmp_path / "run", base=base)
    manifest = json.loads((run / "manifest.json").read_text())
    assert math.isfinite(manifest["metrics"]["test_loss"])
    saved = load_file(run / "adapter_model.safetensors")
    assert any("pooler.dense.weight" in key for key in saved)


@pytest.mark.parametrize("width", [24, 64])
def test_a_quantized_layer_gives_gradients_after_an_evaluation(width: int) -> None:
    # On some CPUs an evaluation packs the codes for a kernel that has none, or refuses the width.
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layers = [bnb.nn.Linear4bit(width, width, bias=False, quant_type="nf4") for _ in "ab"]
    model = nn.Sequential(*layers).to("cpu").eval()
    x = torch.randn(8, width)
    if width % 32 == 0:
        with torch.no_grad():
            model(x)  # packed before there is an adapter
    add_lora(model, rank=2, alpha=2, targets=["0"], seed=0)
    with torch.no_grad():
        model.eval()(x)
    factors = model[0].adapters["default"]
    nn.init.normal_(factors.B)
    model.train()(x).sum().backward()
    first, second = (
        bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
        for layer in (model[0].base_layer, model[1])
    )
    A, B = (one.detach().clone().requires_grad_(True) for one in (factors.A, factors.B))
    ((x @ first.T + x @ A.T @ B.T) @ second.T).sum().backward()
    for found, expected in ((factors.A.grad, A.grad), (factors.B.grad, B.grad)):
        assert (found - expected).norm() < 1e-4 * expected.norm()


def cli(*arguments: str) -> Any:
    return CliRunner().invoke(group, ["train", *arguments])


def test_a_csv_and_a_local_model_are_enough(models: Path, reviews: Path, tmp_path: Path) -> None:
    base, out = base_of(models, "bert"), tmp_path / "run"
    options = ["--base", base, "-o", str(out), "--steps", "5", "--device", "cpu"]
    done = cli(str(reviews), *options, "--rank", "2", "--lr", "0.01")
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.stdout
    assert len(read_adapter(out)) == 12
    again = cli(str(reviews), *options, "--rank", "2", "--lr", "0.01", "--format", "json")
    document = json.loads(again.stdout)
    assert document["config"]["rank"] == 2
    assert document["config"]["loop"]["schedule"] == "linear"


def changed_base(models: Path, folder: Path, **fields: Any) -> Path:
    shutil.copytree(base_of(models, "bert"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize("model_type", ["bert", "made-up"])
def test_code_that_a_base_brings_is_never_run(
    models: Path,
    reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
) -> None:
    ran = tmp_path / "ran"
    kinds = ("AutoConfig", "AutoModelForSequenceClassification")
    base = changed_base(
        models,
        tmp_path / "base",
        model_type=model_type,
        auto_map={name: f"modeling_theirs.{name}" for name in kinds},
    )
    (base / "modeling_theirs.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # as somebody in a hurry would answer
    options = ["--base", str(base), "-o", str(tmp_path / "run"), "--steps", "1", "--device", "cpu"]
    done = cli(str(reviews), *options)
    assert not ran.exists()
    if model_type == "bert":  # whose own class transformers has
        assert done.exit_code == 0, done.output
    else:
        assert "code from a base's folder is never run" in str(done.exception)


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "somebody/kernel"},
        {"text_config": {"experts_implementation": "somebody/kernel"}},
        {"_attn_implementation": "somebody/kernel"},
    ],
)
def test_a_base_that_names_code_of_a_hub_is_refused(
    models: Path, reviews: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    base = changed_base(models, tmp_path / "base", **fields)
    done = cli(str(reviews), "--base", str(base), "-o", str(tmp_path / "run"), "--steps", "1")
    assert isinstance(done.exception, InputError)
    assert "config.json: " in str(done.exception)
    assert "'somebody/kernel'" in str(done.exception)


def test_an_adapter_beside_a_base_is_not_loaded_with_it(
    models: Path, reviews: Path, tmp_path: Path
) -> None:
    base = changed_base(models, tmp_path / "base")
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    done = cli(str(reviews), "--base", str(base), "-o", str(tmp_path / "run"), "--steps", "1")
    assert "holds an adapter next to the model" in str(done.exception)


def test_a_base_in_a_pickle_is_read_when_asked_alone(
    models: Path, reviews: Path, tmp_path: Path
) -> None:
    base = changed_base(models, tmp_path / "base")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    options = ["--base", str(base), "-o", str(tmp_path / "run"), "--steps", "1", "--device", "cpu"]
    done = cli(str(reviews), *options)
    assert "--allow-pickle" in str(done.exception)
    done = cli(str(reviews), *options, "--allow-pickle")
    assert done.exit_code == 0, done.output


def test_a_terminal_sees_loss_rate_and_what_is_left_out(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    data = write_reviews(tmp_path / "reviews.csv")
    data.write_text(data.read_text() + "no label,\n")
    options = ["--base", base_of(models, "bert"), "-o", str(tmp_path / "run"), "--device", "cpu"]
    done = cli(str(data), *options, "--steps", "3")
    assert done.exit_code == 0, done.output
    assert "1 of 61 rows are left out (line 62: 'label' is empty)" in done.stderr.replace("\n", " ")
    assert "lr " in done.stderr


def test_options_lie_over_a_file_and_that_over_a_preset(
    models: Path, reviews: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text("alpha = 12\n[loop]\nbatch_size = 4\nsteps = 9\n")
    out = tmp_path / "run"
    done = cli(
        *[str(reviews), "--base", base_of(models, "roberta"), "-o", str(out), "--device", "cpu"],
        *["--preset", "roberta-base-sst2", "--config", str(tmp_path / "run.toml")],
        *[
            "--steps",
            "2",
            "--set",
            "loop.gradient_accumulation_steps=2",
            "--set",
            "base.dropout=0.0",
            "--quiet",
        ][:-1],
    )
    assert done.exit_code == 0, done.output
    config = json.loads((out / "manifest.json").read_text())["config"]
    assert (config["rank"], config["alpha"]) == (8, 12)
    assert config["targets"] == ["query", "value"]
    loop = config["loop"]
    assert (loop["batch_size"], loop["steps"], loop["epochs"]) == (4, 2, None)
    assert (loop["lr"], loop["gradient_accumulation_steps"], loop["warmup_ratio"]) == (
        5e-4,
        2,
        0.06,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "loop.lrr=1"], "no option 'lrr' in loop"),
        (["--set", "lr"], "--set takes KEY=VALUE"),
        (["--preset", "gpt2-e2"], "no preset 'gpt2-e2'. Near names: gpt2-e2e"),
        (["--base", "."], "has no config.json"),
        (["--config", "nowhere.toml"], "nowhere.toml does not exist"),
        (["--tracker", "x"], "no tracker 'x'"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(
    options: list[str], words: str, reviews: Path, tmp_path: Path
) -> None:
    from lora_analysis.cli import run

    given = ["train", str(reviews), "-o", str(tmp_path / "run"), *options]
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("click.echo", lambda message=None, **_: said.append(str(message)))
        code = run(given)
    assert code in (2, 3)
    assert words in " ".join(said) or code == 2


def test_a_base_without_a_tokenizer_is_refused_by_name(
    models: Path, reviews: Path, tmp_path: Path
) -> None:
    import shutil

    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(base_of(models, "gpt2")) / name, bare / name)
    table = {"base": {"source": str(bare)}, "data": {"source": str(reviews)}}
    with pytest.raises(InputError, match=r"bare has no tokenizer"):
        train_run(RunConfig.from_dict(table), tmp_path / "run", device="cpu")


def test_the_packaged_encoder_is_refused_when_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.machinery import ModuleSpec

    from lora_analysis.training.inputs import minilm_folder

    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"lora-analysis\[demo-text\]"):
        minilm_folder()
    (tmp_path / "model").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_bytes(b"other")
    spec = ModuleSpec("x", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    with pytest.raises(MalformedFileError, match=r"model\.safetensors: its SHA-256 is d9298a10"):
        minilm_folder()


def test_the_run_of_a_config_and_that_of_its_table_are_one(models: Path, reviews: Path) -> None:
    table = {"base": {"source": base_of(models, "bert")}, "data": {"source": str(reviews)}}
    config = RunConfig.from_dict(table)
    assert RunConfig.from_dict(config.to_dict()) == replace(config, data_seed=0, dropout_seed=0)

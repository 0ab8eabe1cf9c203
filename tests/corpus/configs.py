"""Damage to ``adapter_config.json`` and to what lies beside it."""

from __future__ import annotations

import json
from pathlib import Path

from corpus.files import CONFIG, WEIGHTS, Case, configured, peft

_ENDLESS = "(a+)+$"


def _raw(field: str, value: str) -> bytes:
    """The configuration with a value that Python's writer would not write."""
    text = json.dumps({key: one for key, one in CONFIG.items() if key != field})
    return f'{text[:-1]}, "{field}": {value}}}'.encode()


def _alone(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


def _manifest(text: bytes) -> object:
    def make(folder: Path) -> Path:
        (folder / "manifest.json").write_bytes(text)
        return peft(folder)

    return make


def _endless(folder: Path) -> Path:
    """A pattern that backtracks without end on the module's name."""
    name = "base_model.model." + "a" * 60 + "b"
    weights = (peft(folder) / WEIGHTS).read_bytes()
    old = b"base_model.model.layers.0.q_proj"
    length = int.from_bytes(weights[:8], "little")
    header = weights[8 : 8 + length].replace(old, name.encode())
    raw = len(header).to_bytes(8, "little") + header + weights[8 + length :]
    return peft(folder, raw, {**CONFIG, "alpha_pattern": {"(a|aa)+": 3}})


FIELDS = [
    Case(f"{field} is {value!r}", configured({field: value}), code, said)
    for field, value, code, said in (
        ("r", True, 3, "r must be"),
        ("r", "2", 3, "r must be"),
        ("r", 0, 3, "r must be"),
        ("r", -1, 3, "r must be"),
        ("r", 2.0, 3, "r must be"),
        ("r", [2], 3, "r must be"),
        ("r", 2**40, 3, "r must be"),
        ("r", 64, 0, ""),
        ("lora_alpha", "4", 3, "lora_alpha must be"),
        ("lora_alpha", None, 0, "scale of 1 of 1 modules is not known"),
        ("lora_alpha", True, 3, "lora_alpha must be"),
        ("lora_alpha", {}, 3, "lora_alpha must be"),
        ("lora_alpha", 10**400, 3, "lora_alpha must be"),
        ("lora_alpha", -4, 0, ""),
        ("lora_alpha", 0, 0, ""),
        ("use_rslora", "yes", 3, "use_rslora must be"),
        ("use_dora", 1, 3, "use_dora must be"),
        ("use_dora", True, 3, "lora_magnitude_vector"),
        ("fan_in_fan_out", "no", 3, "fan_in_fan_out must be"),
        ("rank_pattern", [1], 3, "rank_pattern must be"),
        ("rank_pattern", {"q_proj": True}, 3, "rank_pattern"),
        ("alpha_pattern", {"q_proj": "x"}, 3, "alpha_pattern"),
        ("alpha_pattern", {"[q": 3}, 3, "not a regular expression"),
        ("alpha_pattern", {"": 3}, 0, ""),
        ("alpha_pattern", {"(?R)": 3}, 3, "not a regular expression"),
        ("alpha_pattern", {"(" * 5000: 3}, 3, "not a regular expression"),
        ("alpha_pattern", {"(" * 5000 + ")" * 5000: 3}, 3, "not a regular expression"),
        ("alpha_pattern", {"a{1,999999999}": 3}, 0, ""),
        ("alpha_pattern", {"(((a{1,9999}){1,9999}){1,9999})": 3}, 0, ""),
        ("modules_to_save", "head", 3, "modules_to_save must be"),
        ("modules_to_save", [1], 3, "modules_to_save must be"),
        ("target_modules", 3, 0, ""),
        ("target_modules", _ENDLESS, 0, ""),
        ("target_parameters", "experts", 3, "target_parameters must be"),
        ("layer_replication", [[0, 10**9]], 3, "layer_replication must be"),
        ("layer_replication", [[0]], 3, "layer_replication must be"),
        ("layer_replication", "0,2", 3, "layer_replication must be"),
        ("base_model_name_or_path", 7, 3, "base_model_name_or_path must be"),
        ("base_model_name_or_path", "</script>\x1b[2J", 0, ""),
        ("peft_type", None, 3, "peft_type is None"),
        ("peft_type", ["LORA"], 3, "peft_type is"),
        ("peft_type", {"a": 1}, 3, "peft_type is"),
        ("peft_type", "x" * 10_000, 3, "peft_type is"),
        ("peft_type", "IA3", 3, "a factor per feature"),
        ("peft_type", "ADALORA", 3, ""),
        ("init_lora_weights", ["pissa"], 3, "init_lora_weights"),
        ("init_lora_weights", "pissa_niter_4", 3, "Pass --initial"),
        ("init_lora_weights", 3, 3, "init_lora_weights"),
        ("auto_mapping", {"parent_library": "os"}, 0, ""),
        ("bias", 5, 0, ""),
        ("arrow_config", {"a": 1}, 3, "Arrow"),
        ("enable_lora", [True, "no"], 3, ""),
        ("enable_lora", 7, 3, ""),
    )
]
TEXTS = [
    Case(f"a config that is {what}", configured(raw), code, said)
    for what, raw, code, said in (
        ("empty", b"", 3, "not valid JSON"),
        ("half of one", json.dumps(CONFIG).encode()[:30], 3, "not valid JSON"),
        ("a list", b"[]", 3, "JSON object"),
        ("an empty object", b"{}", 3, "peft_type"),
        ("bad UTF-8", b'{"r": "\xff"}', 3, "not UTF-8"),
        ("UTF-16", json.dumps(CONFIG).encode("utf-16"), 3, ""),
        ("too large", b" " * (2**20 + 1), 3, "too many"),
        ("deep", b'{"a":' * 100_000, 3, "too deeply"),
        ("deep in a list", b'{"a":' + b"[" * 500_000, 3, "too deeply"),
        ("naming r twice", _raw("r", '2, "r": 4'), 3, "appears twice"),
        ("alpha 1e999", _raw("lora_alpha", "1e999"), 3, "lora_alpha must be"),
        ("alpha NaN", _raw("lora_alpha", "NaN"), 3, "lora_alpha must be"),
        ("alpha of 5000 digits", _raw("lora_alpha", "9" * 5000), 3, "not valid JSON"),
        ("alpha of 4000 digits", _raw("lora_alpha", "9" * 4000), 3, "lora_alpha must be"),
        ("r of 4000 digits", _raw("r", "9" * 4000), 3, "r must be"),
        ("alpha 1e308", _raw("lora_alpha", "1e308"), 3, "the limits are"),
        ("alpha 1e-320", _raw("lora_alpha", "1e-320"), 3, "the limits are"),
    )
]
BESIDE = [
    Case("a config without weights", _alone, 3, "adapter_model.safetensors"),
    Case("weights without a config", lambda f: peft(f, config=None), 0, "not known"),
    Case("an endless pattern", _endless, 3, "was stopped after"),
    *(
        Case(f"a manifest that is {what}", _manifest(text), 0, "")
        for what, text in (
            ("empty", b""),
            ("a list", b"[]"),
            ("of odd types", b'{"seed": true, "task": 3, "metrics": [1]}'),
            ("of metrics that are none", b'{"metrics": {"a": 1e999, "b": "x", "c": null}}'),
            ("a seed without end", b'{"seed": ' + b"9" * 4000 + b"}"),
            ("a task in escapes", b'{"task": "\\u001b[2J</script>"}'),
        )
    ),
]
CASES = [*FIELDS, *TEXTS, *BESIDE]

"""Run PEFT's tests that save adapters, and report what reading their folders gave."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftModel

from peft_client.oracle import Outcome, check_folder

FILES = ("test_custom_models.py", "test_initialization.py", "test_lora_variants.py")


class Client:
    """A pytest plugin that reads every folder that ``PeftModel.save_pretrained`` writes."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.tests: Counter[str] = Counter()
        self.test = ""

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.test = item.nodeid

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.tests[report.outcome] += 1

    def install(self) -> None:
        save = PeftModel.save_pretrained

        def save_and_read(
            model: Any,
            save_directory: Any,
            safe_serialization: bool = True,
            selected_adapters: list[str] | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            initial = kwargs.get("path_initial_model_for_weight_conversion")
            result = save(
                model, save_directory, safe_serialization, selected_adapters, *args, **kwargs
            )
            for name in selected_adapters or list(model.peft_config):
                folder = Path(save_directory) / ("" if name == "default" else name)
                outcome = check_folder(folder, model, name, Path(initial) if initial else None)
                outcome.test = self.test
                self.outcomes.append(outcome)
                if outcome.is_failure:  # at once: the run takes long
                    _print_failure(outcome)
            return result

        PeftModel.save_pretrained = save_and_read  # type: ignore[method-assign]

    def report(self) -> None:
        """Print the counts, each kind of refusal once, and every failure."""
        counts = Counter(outcome.kind for outcome in self.outcomes)
        print(f"\n{len(self.outcomes)} folders read: {dict(counts)}")
        print(f"PEFT's own tests: {dict(self.tests)}")
        for (kind, method), count in sorted(
            Counter((outcome.kind, outcome.method) for outcome in self.outcomes).items()
        ):
            print(f"  {kind:18} {method:24} {count}")
        reasons = Counter(
            f"{outcome.method}: {_without_names(outcome)}"
            for outcome in self.outcomes
            if outcome.kind == "refused"
        )
        for reason, count in reasons.most_common():
            print(f"  refused {count} x {reason}")
        for outcome in self.outcomes:
            if outcome.is_failure:
                _print_failure(outcome)


def _print_failure(outcome: Outcome) -> None:
    # Past what pytest captures, of sys.stderr alone: see pytest.ini.
    text = f"\n{outcome.kind.upper()} {outcome.method} in {outcome.test}\n    {outcome.detail}"
    print(text, file=sys.__stderr__, flush=True)


def _without_names(outcome: Outcome) -> str:
    text = outcome.detail.replace(outcome.folder, "FOLDER")
    return re.sub(r"'[^']*'|\d+", "…", text)[:160]


def _tests_version(folder: Path) -> str:
    """Return the version of the checkout that holds the tests."""
    source = folder.resolve().parent / "src" / "peft" / "__init__.py"
    text = source.read_text(encoding="utf-8") if source.is_file() else ""
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    return match[1] if match else "an unknown version"


def main(arguments: list[str]) -> int:
    """Run the tests in the folder ``arguments[0]``; more arguments go to pytest."""
    folder = Path(arguments[0] if arguments else "")
    files = [str(folder / name) for name in FILES]
    missing = [name for name in files if not Path(name).is_file()]
    if not arguments or missing:
        print(f"usage: python -m peft_client PATH/TO/peft/tests; not there: {missing}")
        return 2
    version = _tests_version(folder)
    if version != peft.__version__:
        print(f"PEFT {peft.__version__} is installed; these are the tests of {version}.")
    client = Client()
    client.install()
    settings = str(Path(__file__).with_name("pytest.ini"))
    try:
        options = ["-c", settings, "--rootdir", str(folder.parent), *arguments[1:]]
        pytest.main([*files, *options], [client])
    finally:
        client.report()
    return int(not client.outcomes or any(outcome.is_failure for outcome in client.outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

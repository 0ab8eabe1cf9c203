"""Where the files shipped with the package lie."""

from __future__ import annotations

from pathlib import Path

from lora_analysis.errors import SourceError

_PACKAGE = Path(__file__).resolve().parents[1]


def bundled_data(name: str) -> Path:
    """Return the path of a shipped file or folder.

    An installed package carries them in ``lora_analysis/data``; a checkout keeps them in
    ``data/`` at its root.

    Parameters
    ----------
    name
        Name inside the data folder, for example ``"digits-vit"``.

    Raises
    ------
    SourceError
        Nothing of that name is shipped.
    """
    places = [_PACKAGE / "data", _PACKAGE.parent / "data"]
    for place in places:
        if (place / name).exists():
            return place / name
    searched = " or ".join(str(place) for place in places)
    message = f"No bundled data named '{name}' in {searched}. Is the installation complete?"
    raise SourceError(message)

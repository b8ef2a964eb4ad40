"""PyAV, loaded by the first who writes or reads a video file: everything else works without it."""

from types import ModuleType

from miga_engine.errors import MigaError


def require_av(action: str, error: type[MigaError] = MigaError, instead: str = "") -> ModuleType:
    """The package av, or `error`: "cannot <action>: …"."""
    try:
        import av
        import av.bitstream
        import av.codec.context
        import av.video.reformatter
    except ImportError as missing:
        raise error(f"cannot {action}: the package av (PyAV) is not installed; install it{instead}") from missing
    return av

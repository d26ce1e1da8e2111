"""Format numbers of bytes."""


def format_bytes(count: float) -> str:
    """`8.25 GiB`, `512 MiB`, `12 KiB`."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):.2f} GiB"
    if count >= 1 << 20:
        return f"{count / (1 << 20):.0f} MiB"
    return f"{max(count, 0) / (1 << 10):.0f} KiB"

"""JPEG files cut short: a decoder that is told of fewer rows stops there, and all above is the same.

A baseline JPEG (ITU-T T.81) holds its blocks row by row from the top, and its frame header says how many
rows of pixels there are. With a smaller number there, the blocks below are never decoded: a crop costs what
lies above its lower edge.
"""

END_OF_IMAGE = b"\xff\xd9"
_BASELINE = (0xC0, 0xC1)  # frame headers whose blocks come in one pass; others take several over the image
_NO_SEGMENT = (0xDA, 0xFF)  # the scan itself, and fill bytes, which files hardly ever have


def shorten(raw: bytes, num_rows: int) -> bytes:
    """Return a JPEG whose first ``num_rows`` rows of pixels are those of ``raw``, to the last bit.

    Two more are kept at least, for colours are interpolated between rows. The file stays as it is where
    cutting would not do: if it is progressive, is damaged in its headers, or does not end as it should, so
    that the decoder shall say so.

    Args:
        raw: The bytes of a JPEG file.
        num_rows: Rows that are wanted, from the top.
    """
    frame = _find_frame(raw)
    if frame is None or not raw.rstrip(b"\0").endswith(END_OF_IMAGE):
        return raw
    height = int.from_bytes(raw[frame + 5 : frame + 7])
    sampling = raw[frame + 11 : frame + 10 + 3 * raw[frame + 9] : 3]
    block_rows = 8 * max(factors & 15 for factors in sampling)
    kept = -(-(num_rows + 2) // block_rows) * block_rows
    if kept >= height:  # 0 stands for a height that is given later
        return raw
    return raw[: frame + 5] + kept.to_bytes(2) + raw[frame + 7 :]


def _find_frame(raw: bytes) -> int | None:
    """Return where the frame header of a baseline JPEG begins, at its marker; None if there is none."""
    position = 2
    while position + 10 < len(raw) and raw[position] == 0xFF:
        marker = raw[position + 1]
        if marker in _BASELINE:
            return position
        if marker in _NO_SEGMENT:
            return None
        position += 2 + int.from_bytes(raw[position + 2 : position + 4])
    return None

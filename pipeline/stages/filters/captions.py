"""Text normalisation: what filters take for the caption.

``ftfy.fix_text`` (Speer, 2019, doi:10.5281/zenodo.2591652) mends mojibake, HTML entities, odd quotes and widths, drops
control characters and composes the rest (NFC); then white space becomes single spaces. open_clip's tokeniser cleans
captions the same way. What is stored stays as it is.
"""

import ftfy


def clean_text(text: str) -> str:
    """``text`` mended by ftfy, on one line, with single spaces."""
    return " ".join(ftfy.fix_text(text).split())

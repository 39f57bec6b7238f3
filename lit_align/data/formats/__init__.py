"""From raw rows to typed rows. Data modules read all data through `read_rows`.

    file, folder, hub ──▶ Record (columns as they are) ──Format.parse──▶ Row (prompt, responses) ──▶ kind

The layout is detected once, from the first row, in the order of `LAYOUTS`; all other rows must fit it. Prompts are all
plain text or all chats. A response is text (in a chat, the content of its last turn) or a message with further keys.
Rows that a rule leaves out are counted by reason; a row that no rule covers is an error that names it.
"""

from typing import TYPE_CHECKING

from lit_align.lazy import lazy_exports

if TYPE_CHECKING:
    from lit_align.data.formats.read import read_rows
    from lit_align.data.formats.rows import Answer, DataError, Kind, Message, Row, Rows, Text, answer_text

__all__ = ["Answer", "DataError", "Kind", "Message", "Row", "Rows", "Text", "answer_text", "read_rows"]

__getattr__ = lazy_exports(__name__)

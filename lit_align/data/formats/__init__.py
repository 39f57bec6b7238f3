"""From raw rows to typed rows. Whatever a data module reads passes through `read_rows`.

    file, folder, hub ──▶ Record (columns as they are) ──Format.parse──▶ Row (prompt, responses) ──▶ kind

The format is detected once, by the first row, in the order of `FORMATS`; every further row must fit it. Prompts
are all plain text or all chats; a response is always text, in a chat the content of its last turn. What a rule
leaves out is counted under its reason; what no rule covers is an error that names the row.
"""

from lit_align.data.formats.read import read_rows
from lit_align.data.formats.rows import Answer, DataError, Kind, Message, Row, Rows, Text, answer_text

__all__ = ["Answer", "DataError", "Kind", "Message", "Row", "Rows", "Text", "answer_text", "read_rows"]

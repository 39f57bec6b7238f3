"""Reddit posts and their summaries, as in the TL;DR papers (Stiennon et al., arXiv 2009.01325)."""

from lit_align.data.formats.layouts.layout import IMITATION, PAIRS, Layout
from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import Row


def _post_row(record: Record) -> Row:
    _, post = record.get("post|info")
    post = record if isinstance(post, str) else record.inner("info")
    summary = record.string("summary") if isinstance(record.values.get("summary"), str) else ""
    return Row(_post(post), (_after_colon(summary),) if summary else (), source=record.source)


def _comparison_row(record: Record) -> Row:
    """OpenAI's summarize_from_feedback: a post, two summaries, and which one a person chose."""
    name, summaries = record.get("summaries")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise record.wrong(name, summaries, "a list of two summaries")
    texts = [
        _after_colon(Record({"summaries": each}, record.source).inner("summaries").string("text")) for each in summaries
    ]
    name, choice = record.get("choice")
    if choice not in (0, 1):
        raise record.wrong(name, choice, "0 or 1")
    return Row(_post(record.inner("info")), (texts[choice], texts[1 - choice]), source=record.source)


def _post(record: Record) -> str:
    """SUBREDDIT, TITLE and POST, if given, and then TL;DR:, which the summary follows."""
    heads = {
        "subreddit": "SUBREDDIT: r/{}",
        "title": "TITLE: {}",
        "post": "POST: {}",
        "article": "ARTICLE: {}",
    }
    if not record.has("post|article"):
        record.string("post")
    parts = [head.format(record.string(column).strip()) for column, head in heads.items() if record.has(column)]
    return "\n\n".join([*parts, "TL;DR:"])


def _after_colon(words: str) -> str:
    """A summary as it follows `TL;DR:`, after one space."""
    return f" {words.strip()}" if words.strip() else ""


COMPARISONS = (Layout("TL;DR comparisons", ("info", "summaries", "choice"), PAIRS, _comparison_row, is_whole=True),)
POSTS = (Layout("TL;DR posts", ("post|info",), IMITATION, _post_row, is_whole=True),)

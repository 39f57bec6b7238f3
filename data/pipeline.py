"""Make the data of `configs/pipeline/` from the quickstart's rated review sentences: `python -m data.pipeline`.

It writes into `data/quickstart/pipeline/`:

    sft.jsonl                     400 openings with the rest of their sentence, to imitate
    sft_validation.jsonl          100 others; forgetting is measured on them, too
    preferences.jsonl             400 pairs: a sentence that people rated above 1, and one that they rated below -1
    preferences_validation.jsonl  200 others; the share that the reward model ranks correctly is its AUC

The files share no sentence, and no opening is among the prompts. The training sentences are those that the quickstart's
judge was fitted to; the validation sentences were held out there. The judge and the reward model are different models,
but both learned from the same people.
"""

import json

from data.quickstart import EXAMPLES, FOLDER, Snippet, split_snippets

SIZES = {"sft": (400, 100), "preferences": (400, 200)}


def imitation(snippets: list[Snippet]) -> list[dict[str, str]]:
    """Rows whose prompt ends with a sentence's first three words, and whose completion is the rest."""
    rows = []
    for snippet in snippets:
        words = snippet.text.split()
        if len(words) > 6:
            rows.append({"prompt": EXAMPLES + " ".join(words[:3]), "completion": " " + " ".join(words[3:])})
    return rows


def preferences(snippets: list[Snippet]) -> list[dict[str, str]]:
    """Pairs of a sentence rated above 1 and one rated below -1."""
    liked = [snippet.text for snippet in snippets if snippet.rating > 1]
    disliked = [snippet.text for snippet in snippets if snippet.rating < -1]
    return [{"prompt": EXAMPLES, "chosen": a, "rejected": b} for a, b in zip(liked, disliked, strict=False)]


def main() -> None:
    """Write the four files."""
    _, rest = split_snippets()
    held_out, fitted = rest[:1000], rest[1000:]
    folder = FOLDER / "pipeline"
    folder.mkdir(exist_ok=True)
    for name, make in {"sft": imitation, "preferences": preferences}.items():
        first = name == "sft"
        sources = (fitted[:1200], held_out[:200]) if first else (fitted[1200:], held_out[200:])
        for source, size, suffix in zip(sources, SIZES[name], ("", "_validation"), strict=True):
            rows = make(source)[:size]
            (folder / f"{name}{suffix}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(f"{name + suffix:24} {len(rows)} rows")


if __name__ == "__main__":
    main()

"""Short captions of a concept, put together from its label (emojibase), tags (emojibase) and keywords (emojilib)."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

MAX_CAPTIONS = 5
APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"  # becomes a plain one
IN_PHRASE = 4  # words after "label: "
IN_LIST = 6  # words in a caption without the label

# Left out: fragments that mean nothing alone, traces of code point names ("heavy black heart" is drawn red), what is
# no part of the image or of one style only ("blue-square"), and swear words.
DROPPED = re.compile(
    r"and|for|the|with|black|white|heavy|twitter|indicator|letters|regional|late|early|schedule|ass|crap|shit|.*-square"
)
WORD = re.compile(r"[^\W\d_][\w '.&-]{2,}|\d{1,2}:\d\d")  # no emoticons, no country codes, no quote fragments


def clean(term: str) -> str | None:
    """Return a tag or keyword as plain words, or None where it is no word (an emoticon, a fragment, a code)."""
    if "\xa0" in term:  # emojilib: the tail of a longer phrase that was cut at its first space
        return None
    text = " ".join(term.replace("_", " ").replace(APOSTROPHE, "'").split()).removesuffix("!")
    if not WORD.fullmatch(text) or DROPPED.fullmatch(text.lower()):
        return None
    return text


def words(text: str) -> tuple[str, ...]:
    """The words of a text in lower case and alphabetical order: two captions with equal words say the same."""
    return tuple(sorted(re.findall(r"[\w'-]+", text.lower().replace(APOSTROPHE, "'"))))


def new_terms(terms: Iterable[str], said: Iterable[str]) -> list[str]:
    """The clean terms, in order, each once, that add something to the words already said (or to their plural)."""
    known = {form for word in said for form in (word, word + "s", word.removesuffix("s"))}
    result: list[str] = []
    for term in map(clean, terms):
        if term and not known.issuperset(words(term)):
            result.append(term)
            known.update(words(term))
    return result


def as_phrase(label: str) -> str:
    """The label without its colon, so that it can open a longer caption: "flag: Peru" becomes "flag of Peru"."""
    head, colon, tail = label.partition(": ")
    if not colon:
        return label
    return f"flag of {tail}" if head == "flag" else f"{head} {tail}" if head == "keycap" else f"{head} ({tail})"


def captions(label: str, tags: list[str], keywords: list[str]) -> list[str]:
    """Return up to MAX_CAPTIONS captions, the label first; no two have the same words.

    `keywords` are emojilib's, whose first entry repeats the label.
    """
    keywords = keywords[1:]
    phrase = as_phrase(label)
    said = words(label)
    more_tags = new_terms(tags, said)
    more_keywords = new_terms(keywords, [*said, *(word for tag in more_tags for word in words(tag))])
    found = [label, phrase]
    found += [f"{phrase}: {', '.join(terms[:IN_PHRASE])}" for terms in (more_tags, more_keywords) if terms]
    lists = (new_terms(tags, ()), new_terms(keywords, said))
    found += [", ".join(terms[:IN_LIST]) for terms in lists if len(terms) >= 3]
    distinct: dict[tuple[str, ...], str] = {}
    for text in found:
        distinct.setdefault(words(text), text.replace(APOSTROPHE, "'"))
    return list(distinct.values())[:MAX_CAPTIONS]


def without_shared(texts: Mapping[str, list[str]]) -> tuple[dict[str, list[str]], int]:
    """Drop every caption that says the same as another concept's; labels, which come first, always stay.

    Returns the captions that stay, by concept, and how many were dropped. Raises ValueError when two labels are equal.
    """
    labels = Counter(captions[0].lower() for captions in texts.values())
    twice = sorted(label for label, count in labels.items() if count > 1)
    if twice:
        raise ValueError(f"labels must be unique, these are not: {twice}")
    count = Counter(says for captions in texts.values() for says in {words(text) for text in captions})
    kept = {
        concept: [captions[0], *(text for text in captions[1:] if count[words(text)] == 1)]
        for concept, captions in texts.items()
    }
    return kept, sum(map(len, texts.values())) - sum(map(len, kept.values()))

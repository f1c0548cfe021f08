"""Captions split into words as the COCO evaluation splits them, without its Java.

The evaluation runs Stanford's PTBTokenizer (CoreNLP 3.4.1) with `-preserveLines -lowerCase` and drops a list of
punctuation marks (`pycocoevalcap/tokenizer/ptbtokenizer.py`). These are the lexer's rules as far as captions use them
(Penn Treebank: https://www.cis.upenn.edu/~treebank/tokenization.html), checked against its output. Two of its habits
are kept, since scores depend on them: brackets stay, as `-lrb-`, because the list has them in capitals only, and so do
runs of marks such as `!!`.
"""

# ruff: noqa: RUF001    # the quotation marks and dashes are meant
import re

DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

# Words that keep their full stop, wherever they are: titles, months, days, states, companies. Those in the second
# line do so only where they are capitalised, and those in the third only before a number.
_ABBREVIATIONS = """
    adm al ala alex apr ariz assn atty attys aug ave az bancorp bhd bldg blvd brig bros calif capt cf cie cmdr co col
    colo comdr conn corp cos cpl ct dak dec dept det dr drs esq est etc ext feb fla fri ft ga gen gov govs hon inc ind
    intl jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mich minn mlle mme mo mon mont mr mrs ms mt neb
    nev nov oct okla penn pfc ph plc pres prof profs pty ptys pvt rd rep reps rev sen sens sep sept seq sgt spc sq sr st
    ste supt supts sys tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo
"""
_CAPITALISED = "Ark Del Ill La Mass Miss Ore Pa Tex Wash"
_BEFORE_NUMBERS = "fig no nos pp prop"


def _any(words: str, flag: str = "i") -> str:
    return f"(?{flag}:{'|'.join(sorted(words.split(), key=len, reverse=True))})" if flag else "|".join(words.split())


_LETTER = r"[^\W\d_]"
_PART = r"(?:[dDoOlL]'(?=\w\w))?[^\W½¼¾⅓⅔]+"  # of a hyphenated word
_SPLIT = {  # words that the treebank takes for two
    **{"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me"},
    **{"gimme": "gim me", "'tis": "'t is", "'twas": "'t was"},
}
_PLAIN = {  # written otherwise by the lexer
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "£": "#", "€": "$", "¢": "cents", '"': "''"},
}
_QUOTES = str.maketrans({"’": "'", "‘": "`", "“": '"', "”": '"', "‹": "`", "›": "'", "«": '"', "»": '"', "…": "..."})
_DASHES = str.maketrans({"–": "--", "—": "--", "―": "--"})

# The first that fits is taken, so what is longer or rarer comes first.
_TOKEN = re.compile(
    "|".join(
        (
            r"https?://[^\s\"<>|()]*[^\s\"<>|().,!?:;']",
            r"www\.[^\s\"<>|()]*[^\s\"<>|().,!?:;']",
            r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*",
            r"@\w+",
            r"#[A-Za-z]\w*",
            r"</?[A-Za-z][^<>]*>",
            r"[:;=]-?[()DPp](?!\w)",
            rf"(?<!\w){_any(' '.join(_SPLIT))}(?!\w)",
            # A word before its clitic, and the clitics.
            rf"(?<![\w']){_LETTER}+?(?=[nN]['`][tT](?!\w))",
            r"(?i:n['`]t)(?!\w)",
            r"'(?i:s|re|ll|ve|d|m)(?!\w)",
            r"(?<![\w'])'(?:\d\ds|\d\d|(?i:em|n)(?!\w))'?(?!\w)",
            r"(?<=\w)'(?i:n)'?(?!\w)(?!')",
            r"(?<!\w)[jJyY]'(?=\w)",
            r"(?i:ma'am|o'clock)(?!\w)",
            # Abbreviations and initials keep their full stops.
            rf"(?<!\w)(?:{_any(_ABBREVIATIONS)}|{_any(_CAPITALISED, '')})\.(?![\w])",
            rf"(?<!\w){_any(_BEFORE_NUMBERS)}\.(?=\s*\d)",
            r"(?<![\w.])(?:[A-Za-z]\.)+(?:-[A-Za-z]+)?(?![\w])",
            r"(?<!\w)(?:Ph|Ed)\.D\.",
            # Numbers: times, dates, fractions, with signs and separators.
            r"(?<!\w)[-+]?\d+-\d+/\d+(?!\w)",
            r"(?<!\w)\d+[ \u00a0]\d+/\d+(?![\w/])",
            r"(?<!\w)\d+(?:/\d+)+(?!\w)",
            r"\d+(?::\d+)+",
            r"(?<![\w)])[-+]?\d*(?:[.,]\d+)+(?:-\w+)*(?![\w])",
            r"\+\d+",
            r"(?<![\w)])-\d+(?![\w/-])",
            r"\d+(?:[.,]\d+)+(?:-\w+)*",
            # Words: with hyphens, slashes, marks inside, or & between capitals.
            r"[A-Z]+(?:&[A-Z]+)+(?![a-z])",
            r"[cC](?:\+\+|#)",
            rf"{_LETTER}+(?:[.!?]{_LETTER}+)+(?:\.(?=\w))?",
            rf"{_LETTER}+(?:-{_LETTER}+)*(?:/{_LETTER}+(?:-{_LETTER}+)*)+",
            rf"(?!_){_PART}(?:-{_PART})*(?<!_)",
            r"\.{3,}(?!\w)|\.{3}",
            r"-{2,}",
            r"[!?]{2,}",
            r"\S",
        )
    )
)


def tokens(caption: str) -> list[str]:
    """The words of a caption, lower case, without punctuation."""
    text = caption.translate(_QUOTES).translate(_DASHES)
    found = [word for match in _TOKEN.finditer(text) for word in _written(match[0])]
    return [word for word in found if word not in DROPPED]


def _written(token: str) -> list[str]:
    """A token as the lexer writes it: some are two, some are another; all are in lower case."""
    lower = token.lower()
    if lower in _SPLIT:
        return _SPLIT[lower].split()
    if re.fullmatch(r"\d+ \d+/\d+", lower):
        return [lower.replace(" ", "\u00a0")]  # one word, which a split at spaces must leave whole
    if set(lower) == {"-"}:
        return ["--"]
    if set(lower) == {"."}:
        return ["..."]
    if len(lower) > 1 and lower[0] in ":;=" and lower[-1] in "()":
        return [lower[:-1] + _PLAIN[lower[-1]]]
    return [_PLAIN.get(lower, lower)]

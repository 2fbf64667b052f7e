"""Where English sentences end, by rule.

A sentence ends at a run of ".", "!", "?" or "…" (quotation marks and brackets that close right after it belong to it)
before white space and a capital letter or a digit, perhaps with an opening quotation mark or bracket before it. A bare
full stop does not end one

- after a title ("Mr.", "Gen.") or what leads to the next word ("e.g.", "vs.");
- after "No.", "Fig." and the like before a digit;
- after another known abbreviation ("Inc.", "Jan."), an initial ("J.") or letters with full stops ("U.S.", "a.m."),
  unless the next word is one that sentences often begin with ("The", "He", "But").

So "the U.S. Senate" is whole and "in the U.S. The Senate" is cut, but "in the U.S. Senators" is not: where the rule
errs, it mostly takes two sentences for one.
"""

import re

_LEADING = frozenset(
  "Adm Brig Capt Cmdr Col Cpl Det Dr Fr Ft Gen Gov Hon Insp Lt Maj Messrs Mlle Mme Mr Mrs Ms Mt Pres Prof Pvt Rep Reps "
  "Rev Sen Sens Sgt Supt cf e.g eg i.e ie v viz vs".split()
)
_NUMBERED = frozenset("art ch eq fig figs no nos p pp sec vol vols".split())  # with a capital or without
_ABBREVIATIONS = frozenset(
  "al approx apt ave blvd dept dist est etc Assn Ave Blvd Bros Co Corp Dept Dist Inc Jr Llc Ltd Mfg Rd Sr St Ste Univ "
  "Jan Feb Mar Apr Jun Jul Aug Sept Sep Oct Nov Dec Mon Tue Tues Wed Thu Thurs Fri "
  "Ala Ariz Ark Calif Colo Conn Del Fla Ga Ill Ind Kan Ky La Md Mass Mich Minn Miss Mo Mont Neb Nev Okla Ore Pa Tenn "
  "Tex Va Vt Wash Wis Wyo".split()
)
_OPENERS = frozenset(
  "A According After All Also Although An And Another Any As At Because Before Both But By Do Does Each Even Every For "
  "From Had Has He Her Here His How However I If In Is It Its Just Last Like Many Meanwhile Most My Next No Not Now Of "
  "On Once One Or Other Our Perhaps Several She Since So Some Still Such That The Their Then There These They This "
  "Those Though Through To Today Under Until We Well What When Where Which While Who Why With Yet You Your".split()
)
_LETTERS = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]|[A-Z]|Ph\.D")
_END = re.compile(r"""(?P<word>[^\s.!?…"“‘(\[]*(?:\.[^\s.!?…]+)*)(?P<mark>[.!?…]+)(?P<closers>["'”’)\]]*)\s+""")
_NEXT = re.compile(r"""["'“‘(\[]*(?P<word>[^\W_][\w’']*)(?P<dot>\.?)""")


def split(text: str) -> list[str]:
  """The sentences of a paragraph; line breaks and runs of white space become single spaces.

  Joined by spaces they are the paragraph again.
  """
  text = " ".join(text.split())
  found, start = [], 0
  for end in _END.finditer(text):
    following = _NEXT.match(text, end.end())
    if following and _ends(end, following):
      found.append(text[start : end.end()].rstrip())
      start = end.end()
  return [*found, text[start:]] if start < len(text) else found


def _ends(end: re.Match, following: re.Match) -> bool:
  word, after = end["word"].lstrip("'’-—–"), following["word"]
  if not (after[0].isupper() or after[0].isdigit()):
    return False
  if end["mark"] != "." or end["closers"]:
    return True
  if word in _LEADING or (word.lower() in _NUMBERED and after[0].isdigit()):
    return False
  if word in _ABBREVIATIONS or _LETTERS.fullmatch(word):
    return after in _OPENERS and not following["dot"]  # "J. A. Smith": this A is no article
  return True

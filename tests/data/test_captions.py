"""Caption templates: what they fill in, what they refuse, and that nothing else can be reached through them."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mm.config import validate
from mm.data.captions import Captioner, CaptionTemplate, look_up, parse_template
from mm.errors import BadSample, ConfigError
from mm.seeding import generator
from mm.types import Sample

SAMPLE = Sample(
    "a/1",
    {},
    ("a cat", "a small cat"),
    {
        "name": "cat",
        "keywords": ["pet", "cat", "animal", "whiskers"],
        "names": {"de": "Katze", "fr": "chat"},
        "n": 3,
        "none": None,
    },
)


def draw(template, sample=SAMPLE, count=40):
    captioner = Captioner([CaptionTemplate(template=template)])
    return [captioner(sample, generator(0, i)) for i in range(count)]


def test_what_each_kind_of_value_gives():
    assert set(draw("{text}")) == {"a cat", "a small cat"}
    assert set(draw("an emoji of {name}")) == {"an emoji of cat"}
    assert set(draw("{names}")) == {"Katze", "chat"}
    assert set(draw("{names.de} {n}")) == {"Katze 3"}
    assert set(draw("{{x}} {name}")) == {"{x} cat"}


def test_a_list_gives_subsets_in_random_order():
    drawn = [caption.split(", ") for caption in draw("{keywords}", count=300)]
    assert {len(words) for words in drawn} == {1, 2, 3, 4}
    assert all(len(set(words)) == len(words) and set(words) <= set(SAMPLE.fields["keywords"]) for words in drawn)
    assert len({tuple(words) for words in drawn if len(words) == 2}) == 12  # every ordered pair


def test_weights():
    captioner = Captioner([CaptionTemplate(template="x {name}", weight=3), CaptionTemplate(template="y {name}")])
    counts = Counter(captioner(SAMPLE, generator(i)) for i in range(2000))
    assert 0.7 < counts["x cat"] / 2000 < 0.8


def test_a_template_that_cannot_be_filled_gives_way_to_another():
    captioner = Captioner([CaptionTemplate(template="{names.hi}", weight=1000), CaptionTemplate(template="{name}")])
    assert {captioner(SAMPLE, generator(i)) for i in range(20)} == {"cat"}


@pytest.mark.parametrize("template", ["{missing}", "{none}", "{names.hi}", "{name.sub}", "x {missing} y"])
def test_nothing_to_fill_in(template):
    with pytest.raises(BadSample, match="missing text") as error:
        draw(template)
    assert error.value.cause == "missing text"


def test_sample_without_texts():
    with pytest.raises(BadSample, match="missing text"):
        draw("{text}", Sample("b", {}, ("", " ")))


@pytest.mark.parametrize("template", ["{", "}", "a {name", "name}", "{}", "{a b}", "{a..b}", "{name!r} {"])
def test_malformed_templates_are_refused_by_the_configuration(template):
    with pytest.raises(ConfigError, match="template"):
        validate(CaptionTemplate, {"template": template}, "test.yaml")


def test_no_python_attribute_can_be_reached():
    for template in ("{name.__class__}", "{text.__len__}", "{names.keys}", "{n.real}"):
        with pytest.raises(BadSample):
            draw(template)


@given(st.text())
def test_any_text_is_parsed_or_refused(template):
    try:
        parts = parse_template(template)
    except ValueError:
        return
    rebuilt = "".join(
        "{" + content + "}" if kind == "field" else content.replace("{", "{{").replace("}", "}}") for kind, content in parts
    )
    assert rebuilt == template


def test_a_key_with_dots_is_found_first():
    assert look_up({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert look_up({"a": {"b": 2}}, "a.b") == 2
    assert look_up({"a": 1}, "a.b") is None

"""Episodes: a pure function of source, query and generator, with examples that are the query's concept and others, apart."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from mm.data.episodes import NAMES, EpisodeConfig, Pool, made_up_names
from mm.errors import BadSample, UserError
from mm.types import Sample

ARTISTS = ("ann", "bob", "cem")


class Pictures:
    """Concepts 0..7 by three artists, the first four of one split; concept 7 by one artist only."""

    name, fingerprint = "pictures", "0"

    def __init__(self) -> None:
        every = [(concept, artist) for concept in range(8) for artist in ARTISTS]
        self.rows = [(concept, artist) for concept, artist in every if concept < 7 or artist == "ann"]

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return "{}/{}".format(*self.rows[index])

    def fields(self, index: int) -> Mapping[str, Any]:
        concept, artist = self.rows[index]
        return {"concept": f"c{concept}", "artist": artist, "split": concept // 4, "name": f"thing {concept}"}

    def read(self, index: int) -> Sample:
        return Sample(self.key(index), {}, (), self.fields(index))


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("seed", range(20))
def test_examples_are_of_each_way_and_apart_from_the_query(seed: int) -> None:
    source = Pictures()
    pool = Pool(source, "concept", apart="artist", within="split")
    query = 4
    episode = pool.draw(random(seed), source.fields(query), ways=3, shots=2, query_id=source.key(query))
    concepts: dict[int, set[str]] = {}
    for index, way in episode.support:
        fields = source.fields(index)
        concepts.setdefault(way, set()).add(fields["concept"])
        assert fields["artist"] != source.fields(query)["artist"]
        assert fields["split"] == 0
    assert all(len(values) == 1 for values in concepts.values())
    assert len(set().union(*concepts.values())) == 3
    assert concepts[episode.answer] == {"c1"}
    assert [way for _, way in episode.support].count(0) == 2
    assert len({index for index, _ in episode.support}) == 6
    again = pool.draw(random(seed), source.fields(query), ways=3, shots=2, query_id=source.key(query))
    assert again == episode


def test_the_answer_is_in_no_place_of_its_own() -> None:
    source = Pictures()
    pool = Pool(source, "concept")
    answers = [pool.draw(random(seed), source.fields(0), ways=2, shots=1).answer for seed in range(200)]
    lasts = [pool.draw(random(seed), source.fields(0), ways=2, shots=1).support[-1][1] for seed in range(200)]
    assert 70 < sum(answers) < 130
    assert 70 < sum(last == answer for last, answer in zip(lasts, answers, strict=True)) < 130


def test_fewer_shots_are_the_first_of_more() -> None:
    source = Pictures()
    episode = Pool(source, "concept").draw(random(), source.fields(0), ways=2, shots=3)
    one = episode.first(1)
    assert [way for _, way in one.support].count(0) == [way for _, way in one.support].count(1) == 1
    assert set(one.support) <= set(episode.support)
    assert not episode.first(0).support
    assert (one.names, one.answer) == (episode.names, episode.answer)


def test_a_query_is_no_example_of_itself() -> None:
    source = Pictures()
    pool = Pool(source, "concept")
    for seed in range(20):
        episode = pool.draw(random(seed), source.fields(0), ways=2, shots=3, query_id=source.key(0))
        assert 0 not in [index for index, _ in episode.support]
    lonely = len(source) - 1
    with pytest.raises(BadSample, match="no example left"):
        pool.draw(random(), source.fields(lonely), ways=2, shots=1, query_id=source.key(lonely))


def test_too_few_pictures_leave_a_concept_out() -> None:
    source = Pictures()
    pool = Pool(source, "concept", within="split", min_pictures=2)
    assert not pool.has(source.fields(len(source) - 1))
    assert pool.ways(source.fields(0)) == 4
    assert pool.ways(source.fields(15)) == 3
    with pytest.raises(BadSample, match="missing concept"):
        pool.draw(random(), source.fields(len(source) - 1), ways=2, shots=1)
    with pytest.raises(BadSample, match="too few concepts"):
        pool.draw(random(), source.fields(0), ways=5, shots=1)
    with pytest.raises(UserError, match="no field 'colour'"):
        Pool(source, "colour")


def test_real_names_are_those_of_the_concepts() -> None:
    source = Pictures()
    episode = Pool(source, "concept").draw(random(), source.fields(0), ways=2, shots=1, label="name")
    assert episode.names[episode.answer] == "thing 0"


def test_made_up_names_differ_and_are_given_out_anew() -> None:
    drawn = [made_up_names(random(seed), 5) for seed in range(300)]
    assert all(len(set(names)) == 5 for names in drawn)
    assert len(set(drawn)) == 300
    assert {name for names in drawn for name in names} == set(NAMES)
    assert len(set(NAMES)) == len(NAMES)
    with pytest.raises(UserError, match="take fewer ways"):
        made_up_names(random(), len(NAMES) + 1)


@pytest.mark.parametrize("values", [{"ways": (1, 3)}, {"ways": (3, 2)}, {"shots": (0, 2)}, {"template": "a name"}])
def test_impossible_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EpisodeConfig.model_validate(values)


def test_examples_drawn_anew_come_again_and_hold_the_query() -> None:
    source = Pictures()
    pool, query = Pool(source, "concept"), source.key(0)
    drawn = [pool.draw(random(seed), source.fields(0), ways=2, shots=3, query_id=query, again=True) for seed in range(60)]
    own = [[source.key(row) for row, way in one.support if way == one.answer] for one in drawn]
    assert any(query in keys for keys in own)
    assert any(len(set(keys)) < len(keys) for keys in own)
    assert all(len(keys) == 3 for keys in own)

"""Scenarios: what loads, in which units; what follows; what the sampler may and may not invent."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stakelib.run import CourseError
from stakelib.scenarios import country_profile, derive_metrics, load, sample, scenario_id
from stakelib.scenarios.metrics import Metric, factors, ratios, round_half_up
from stakelib.scenarios.sampler import LOAD_FACTOR

FIXTURE = Path(__file__).parent / "data" / "two-scenarios.json"
RAW = json.loads(FIXTURE.read_text(encoding="utf-8"))
SAMPLES = sample(60, seed=3)


def written(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "scenario.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_load_normalises_units_and_keeps_unknown_unknown() -> None:
    first, second = load(FIXTURE)
    a, b, c = first.milestones
    assert (a.capacity.total.renewables, a.capacity.unit) == (400.0, "MW")
    assert (a.generation.output.fossil, a.generation.unit) == (1000.0, "GWh")
    assert (a.investment.cumulative, b.investment.cumulative, b.investment.unit) == (100.0, 600.0, "m$")
    assert (a.emissions.total, c.emissions.total) == pytest.approx((0.5, 0.2))
    assert a.peakDemand.value == 450.0
    assert c.capacity is None and b.capacity.total.other == 0
    assert first.detailedTech[2030].solarPV == 250 and first.detailedTech[2030].nuclear is None
    assert second.milestones[0].investment is None


def test_load_takes_one_object_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(RAW[0]).encode())
    assert [s.metadata.country for s in load(path)] == ["Examplia"]


def test_load_lists_every_problem_with_file_and_field(tmp_path: Path) -> None:
    bad = copy.deepcopy(RAW)
    bad[0]["milestones"][0]["capacity"]["unit"] = "PW"
    bad[0]["milestones"][1]["reShare"] = 130
    bad[1]["milestones"][1]["year"] = 1999
    bad[1]["metadata"]["country"] = "  "
    with pytest.raises(CourseError) as caught:
        load(written(tmp_path, bad))
    text = "\n".join(caught.value.problems)
    for part in (
        "scenario 1: milestones[0].capacity",
        "'PW'",
        "milestones[1].reShare",
        "scenario 2: milestones[1].year",
        "metadata.country",
        "scenario.json",
    ):
        assert part in text
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '{"metadata": {}}',
        '{"milestones": NaN}',
        "[" * 100000,
        '{"metadata": {"country": "A", "scenarioName": "B"}, "milestones": [{"year": "2030"}]}',
        '{"metadata": {"country": "A", "scenarioName": "B"}, "milestones": [{"year": 2030}, {"year": 2030}]}',
    ],
)
def test_bad_files_raise_one_error_type(tmp_path: Path, text: str) -> None:
    with pytest.raises(CourseError):
        load(written(tmp_path, text))


def test_missing_file_and_wrong_encoding(tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="none.json: no such file"):
        load(tmp_path / "none.json")
    path = tmp_path / "utf16.json"
    path.write_bytes(json.dumps(RAW).encode("utf-16"))  # with its mark, which says what it is
    assert len(load(path)) == len(RAW)
    path.write_bytes(json.dumps(RAW, ensure_ascii=False).replace("Examplia", "Exämplia").encode("latin-1"))
    with pytest.raises(CourseError, match="not UTF-8"):
        load(path)


leaf = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([]), st.just({}))


def paths_of(value: object, at: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for k, v in items for p in [(*at, k), *paths_of(v, (*at, k))]]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(paths_of(RAW)), value=leaf, cut=st.integers(0, 4000), how=st.integers(0, 2))
def test_mutated_files_load_or_raise_course_error(
    tmp_path: Path, where: tuple, value: object, cut: int, how: int
) -> None:
    data = copy.deepcopy(RAW)
    spot = data
    for key in where[:-1]:
        spot = spot[key]
    spot[where[-1]] = value
    text = json.dumps(data)
    path = written(tmp_path, text[:cut] if how == 0 else text)
    try:
        loaded = load(path)
    except CourseError as error:
        assert error.problems and all("scenario.json" in p for p in error.problems)
    else:
        assert all(m.reShare is None or 0 <= m.reShare <= 100 for s in loaded for m in s.milestones)
        for scenario in loaded:
            derive_metrics(scenario)


def test_metrics_of_the_fixture_by_hand() -> None:
    m = derive_metrics(load(FIXTURE)[0])
    built = {"hydro": 50, "solarPV": 200, "wind": 50, "battery": 50}  # 2025 -> 2030
    posts = 50 * 0.5 + 200 * 0.3 + 50 * 0.4 + 50 * 0.1
    work = 50 * 12 + 200 * 10 + 50 * 8 + 50 * 3
    assert sum(built.values()) == 350
    assert m.get("permanent_jobs", "near").value == posts == 110
    assert m.get("jobs", "near").value == round_half_up(work / 5 + posts) == 740
    assert m.get("land", "near").value == 200 * 2 + 50 * 0.3 + 50 * 0.1 == 420
    assert m.get("vre_share", "near").value == round_half_up(100 * 300 / 1010, 1)
    assert m.get("emission_cut", "near").value == 20.0 and m.get("emission_cut", "far").value == 60.0
    assert m.get("yearly_investment", "near").value == 100 and m.get("yearly_investment", "far").value == 100
    assert m.get("peak", "far") is None and m.get("interconnector", "near") is None
    assert "coal" not in {x.key for x in m.shown()} and "diesel" in {x.key for x in m.shown()}


def test_no_fleet_no_jobs() -> None:
    m = derive_metrics(load(FIXTURE)[1])
    assert {x.key for x in m.shown()} == {"re_share"}
    assert "peak.near" not in ratios(m)


def test_printing_is_half_up_and_with_unit() -> None:
    assert [
        str(Metric.of(k, 2030, v))
        for k, v in [
            ("re_share", 64.25),
            ("investment", 2850),
            ("yearly_investment", 532.5),
            ("jobs", 10644.5),
            ("emissions", 1.385),
            ("land", 836),
            ("peak", 7.25),
            ("additions", 105),
        ]
    ] == ["64.3%", "$2,850M USD", "$533M USD per year", "10,645", "1.39 Mt CO2", "836 ha", "7.3 MW", "105 MW per year"]


def test_sample_is_deterministic_and_spread() -> None:
    assert [s.model_dump() for s in sample(60, seed=3)] == [s.model_dump() for s in SAMPLES]
    assert [s.model_dump() for s in sample(60, seed=4)] != [s.model_dump() for s in SAMPLES]
    countries = {s.metadata.country for s in SAMPLES}
    assert 25 <= len(countries) <= 30
    assert len({country_profile(c)["region"] for c in countries}) >= 7
    assert len({scenario_id(s) for s in SAMPLES}) == 60
    shares = [derive_metrics(s).get("re_share", "near").value for s in SAMPLES]
    assert min(shares) < 40 and max(shares) > 80


@pytest.mark.parametrize("scenario", sample(150, seed=8), ids=scenario_id)
def test_sampled_fleet_is_consistent(scenario) -> None:
    place, table = country_profile(scenario.metadata.country), scenario.detailedTech
    investment = [m.investment.cumulative for m in scenario.milestones if m.investment]
    assert investment == sorted(investment)
    for m in scenario.milestones:
        mix = m.generation.output
        assert m.reShare == pytest.approx(100 * mix.renewables / (mix.renewables + mix.fossil), abs=0.06)
        if table is None:
            continue
        fleet = {t: v for t, v in table[m.year] if v is not None}
        assert "coal" in place["mix"] or not fleet["coal"]
        assert not place["island"] or not fleet["interconnector"]
        for kind in ("renewables", "fossil"):
            assert sum(v for t, v in fleet.items() if factors()[t]["kind"] == kind) == pytest.approx(
                getattr(m.capacity.total, kind)
            )
        if m.emissions:
            burnt = sum(
                v * 8.76 * factors()[t]["capacityFactor"] * factors()[t]["co2"]
                for t, v in fleet.items()
                if factors()[t].get("co2")
            )
            assert m.emissions.total == pytest.approx(burnt / 1e6, abs=0.001)


@pytest.mark.parametrize("scenario", sample(150, seed=8), ids=scenario_id)
def test_sampled_additions_and_peak_follow_from_the_fleet(scenario) -> None:
    table = scenario.detailedTech
    for before, m in zip([None, *scenario.milestones], scenario.milestones, strict=False):
        if m.peakDemand:  # renewables are not retired, so that a few fleets give up to a sixth more than is needed
            made = (m.generation.output.renewables + m.generation.output.fossil) / 8.76 / LOAD_FACTOR
            assert made == pytest.approx(m.peakDemand.value, rel=0.2, abs=2)
        if table is None or before is None or m.capacityAdditions is None:
            continue
        added: dict[str, float] = {}
        for tech, mw in table[m.year]:
            if mw is not None:
                kind, old = factors()[tech]["kind"], getattr(table[before.year], tech)
                added[kind] = added.get(kind, 0) + max(0.0, mw - old) / (m.year - before.year)
        for kind in ("renewables", "fossil", "other"):
            assert getattr(m.capacityAdditions.additions, kind) == pytest.approx(added[kind])


def test_samples_cover_the_axes() -> None:
    cells = [s.metadata.cell for s in sample(300, seed=7)]
    pools = {country_profile(s.metadata.country)["pool"] for s in SAMPLES}
    assert pools >= {"SAPP", "EAPP", "WAPP"}
    seen = {axis: Counter(cell[axis] for cell in cells) for axis in cells[0]}
    assert set(seen["geography"]) >= {"Southern Africa", "East Africa", "West Africa", "Mainland Asia", "Island states"}
    for axis, values in {"mix": 4, "ambition": 3, "investment": 3, "challenge": 4}.items():
        assert len(seen[axis]) == values and min(seen[axis].values()) >= 30, axis
    assert len({(c["mix"], c["ambition"]) for c in cells}) == 12
    assert len({tuple(c.values()) for c in cells}) >= 200
    assert "cell" not in SAMPLES[0].model_dump()["metadata"]  # identifiers and files do not hold it


def test_resources_stay_within_the_country() -> None:
    for scenario in sample(300, seed=7):
        place, table = country_profile(scenario.metadata.country), scenario.detailedTech or {}
        for fleet in table.values():
            there = {t for t, mw in fleet if mw and factors()[t]["kind"] in ("renewables", "fossil")}
            assert there <= {*place["mix"], *place["resources"]}
            assert not (place["island"] and fleet.interconnector)


def test_some_samples_lack_data() -> None:
    lacking = [
        s
        for s in SAMPLES
        if s.detailedTech is None
        or s.milestones[0].peakDemand is None
        or s.milestones[0].investment is None
        or s.milestones[0].capacity.total.storage is None
    ]
    assert 10 <= len(lacking) <= 45

"""Recipes and rules: exact names, text and JSON both ways, the last match decides, one sentence a mistake."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitfold.formats import BitfoldError
from bitfold.passes.recipes import Recipe, is_head, names
from bitfold.passes.rules import Rule, Site


def site(path: str = "model.layers.3.mlp.up_proj", op: str = "linear", n: int = 1536, k: int = 576) -> Site:
    return Site((path,), op, n=n, k=k, numel=n * k)


@pytest.mark.parametrize("name", names())
def test_every_name_parses_prints_and_survives_json(name: str) -> None:
    recipe = Recipe.parse(name)
    assert str(recipe) == name
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.about


def test_the_names_are_exact() -> None:
    """What the design says of each name, in rules."""
    said = {name: [str(rule) for rule in Recipe.parse(name).rules] for name in names()}
    assert said["int8"] == ["linear *: weight int8"]
    assert said["int4"] == ["linear *: weight int4[g128]"]
    assert said["int8_all"] == ["linear *: weight int8", "head|embedding *: weight int8"]
    assert said["int4_all"] == ["linear *: weight int4[g128]", "head|embedding *: weight int8"]
    assert said["int8_dynamic"] == ["linear *: weight int8, input int8"]
    assert said["int8_static"] == [
        "linear *: weight int8, input int8[tensor], observed by minmax",
        "conv *: weight int8[narrow], input int8[tensor], observed by minmax",
    ]
    assert said["fp8"] == ["linear *: weight float8_e4m3fn"]
    assert said["none"] == []


def test_a_format_is_a_recipe_for_linears_and_a_name_goes_first() -> None:
    assert Recipe.parse("int4[g64]").rules == (Rule(weight="int4[g64]"),)
    assert Recipe.parse("int4").rules[0].weight == "int4[g128]"
    assert Recipe.parse("int4[row]").rules[0].weight == "int4"
    assert str(Recipe.parse(" int4[g64] ")) == "int4[g64]"


def test_the_last_rule_that_matches_decides() -> None:
    recipe = Recipe(
        "mixed",
        (
            Rule(weight="int4[g64]"),
            Rule("*.mlp.*", weight="int8"),
            Rule("re:model\\.layers\\.(0|1)\\..*", skip="sensitive"),
        ),
    )
    chosen = {
        path: str(recipe.rule(site(path)))
        for path in (
            "model.layers.3.self_attn.q_proj",
            "model.layers.3.mlp.up_proj",
            "model.layers.1.mlp.up_proj",
        )
    }
    assert chosen == {
        "model.layers.3.self_attn.q_proj": "linear *: weight int4[g64]",
        "model.layers.3.mlp.up_proj": "linear *.mlp.*: weight int8",
        "model.layers.1.mlp.up_proj": "linear re:model\\.layers\\.(0|1)\\..*: left alone (sensitive)",
    }
    assert recipe.rule(site(op="head")) is None


def test_a_recipe_from_json_may_build_on_another(tmp_path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"name": "mine", "base": "int4", "rules": [{"match": "*.0.*", "skip": "first"}]}')
    recipe = Recipe.parse(str(path))
    assert [str(rule) for rule in recipe.rules] == [
        "linear *: weight int4[g128]",
        "linear *.0.*: left alone (first)",
    ]
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.parse(str(Recipe.parse("int4").but(Rule("a", weight="int8")))).rules[1].weight == "int8"


def test_files_that_are_no_recipes(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "deep.json").write_text('{"rules": ' + "[" * 100_000 + "]" * 100_000 + "}")
    (tmp_path / "a.json").write_text('{"base": "b.json"}')
    (tmp_path / "b.json").write_text('{"base": "a.json"}')
    for name, sentence in {
        "bytes.json": "recipe file 'bytes.json' is no text: ",
        "\0.json": "recipe file '\\x00.json' is no text: ",
        "deep.json": "deep.json is nested too deep to be a recipe",
        "a.json": "recipe file a.json builds on itself: a.json on b.json on a.json",
    }.items():
        with pytest.raises(BitfoldError) as caught:
            Recipe.parse(name)
        assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("where", "n", "k", "expected"),
    [
        ("", 1, 1, True),
        ("K >= 256 and N % 16 == 0", 32, 256, True),
        ("K >= 256 and N % 16 == 0", 31, 256, False),
        (" K >= 256 ", 1, 256, True),
        ("not (K < 10 or N > 100)", 100, 10, True),
        ("numel // 2 > 3 * (K - 1)", 4, 8, False),
        ("2 < N < 8", 5, 1, True),
        ("2 < N < 8", 8, 1, False),
        ("-N < 0", 3, 1, True),
    ],
)
def test_where_is_a_predicate_on_sizes(where: str, n: int, k: int, expected: bool) -> None:
    assert Rule(where=where, weight="int8").matches(site(n=n, k=k)) is expected


@given(
    st.integers(1, 9999),
    st.integers(1, 9999),
    st.sampled_from(["K % 7 < N", "N * 3 - K > 5 or K == N", "not N % 2"]),
)
def test_where_means_what_python_means(n: int, k: int, where: str) -> None:
    assert Rule(where=where, weight="int8").matches(site(n=n, k=k)) == bool(eval(where, {"N": n, "K": k}))


def test_heads_are_known_by_their_path() -> None:
    heads = ["lm_head", "model.classifier", "head", "transformer.output"]
    others = [
        "model.layers.0.head",
        "layer.3.attention.output",
        "encoder.layer.1.output.dense",
        "heads",
        "x.lm_head.proj",
    ]
    assert [is_head(path) for path in heads + others] == [True] * len(heads) + [False] * len(others)


MISTAKES = {
    "int44": "unknown recipe or format 'int44'; did you mean 'int4' or 'kv_int4'?",
    "int8_al": "unknown recipe or format 'int8_al'; did you mean 'int8_all'",
    "zzz": "unknown recipe or format 'zzz'; give one of none, int8,",
    "int4[q3]": "'int4[q3]' is neither a recipe nor a format: ",
    "{": "the recipe is not valid JSON: ",
    "{}": None,
    '{"rulez": []}': "unknown key 'rulez' in a recipe; did you mean 'rules'?; keys are ",
    '{"rules": [{"wieght": "int8"}]}': "unknown key 'wieght' in a rule; did you mean 'weight'?; keys are ",
    '{"rules": [{"weight": 8}]}': "a rule's weight is text, not 8",
    '{"rules": [{"weight": "int9"}]}': "int9",
    '{"rules": 3}': "a recipe's rules are a list, not 3",
    '{"rules": ["int8"]}': "a rule is an object such as",
    '{"base": "int5000"}': "int5000",
    "gone.json": "recipe file gone.json cannot be read: ",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_a_recipe_gets_one_sentence(text: str) -> None:
    expected = MISTAKES[text]
    if expected is None:
        assert Recipe.parse(text).rules == ()
        return
    with pytest.raises(BitfoldError) as caught:
        Recipe.parse(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"op": "liner", "weight": "int8"}, "unknown op 'liner'; did you mean 'linear'?; allowed: "),
        ({}, "rule '*' says nothing; give weight, input or output a format, or a skip reason"),
        ({"weight": "int8", "skip": "no"}, "rule '*' has both a skip reason and formats; give one of them"),
        ({"match": "re:(", "weight": "int8"}, "'re:(' is not a regular expression: "),
        ({"where": "K >", "weight": "int8"}, "where='K >' cannot be read; write something like"),
        ({"where": "__import__('os')", "weight": "int8"}, "is not allowed; use the names N, K, numel"),
        ({"where": "K ** 9 > 1", "weight": "int8"}, "'K ** 9' is not allowed"),
        ({"where": "-" * 5000 + "K", "weight": "int8"}, "cannot be read; write something like"),
        (
            {"observer": "minmax", "weight": "int8"},
            "rule '*' observes nothing; give input or output a format",
        ),
        ({"where": "M > 1", "weight": "int8"}, "'M' is not allowed"),
        ({"where": "'a' < N", "weight": "int8"}, "\"'a'\" is not allowed"),
        ({"where": "N % (K - K) == 0", "weight": "int8"}, "divides by zero"),
        ({"weight": "int8", "observer": "minmaks"}, "unknown observer 'minmaks'; did you mean 'minmax'?"),
        ({"weight": "int8", "observer": "percentile:abc"}, "a percentile is a number such as 99.9"),
        ({"weight": "int8", "on_misfit": "skip"}, "unknown on_misfit 'skip'"),
    ],
)
def test_a_mistake_in_a_rule_gets_one_sentence(options: dict[str, str], expected: str) -> None:
    with pytest.raises(BitfoldError) as caught:
        Rule(**options)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_holds_rules() -> None:
    with pytest.raises(BitfoldError, match="'int8' is not a Rule"):
        Recipe("mine", ("int8",))

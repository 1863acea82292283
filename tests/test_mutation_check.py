"""The list of mistakes that the tests have to notice: it is about the code as it is."""

import pytest

import mutation_check

SOURCE = (mutation_check.ROOT / mutation_check.SOURCE).read_text(encoding="utf-8")


def test_every_mutation_changes_one_place_and_compiles():
    """Would catch a list that the code has left behind: `mutated` refuses what does not stand there exactly once."""
    for name in mutation_check.MUTATIONS:
        changed = mutation_check.mutated(SOURCE, name)
        assert changed != SOURCE and mutation_check.compiles(changed, SOURCE), name


def test_a_mutation_of_code_that_has_moved_on_is_named(monkeypatch):
    monkeypatch.setitem(mutation_check.MUTATIONS, "gone", ("what never stood there", ""))
    monkeypatch.setitem(mutation_check.MUTATIONS, "everywhere", ("return", "pass"))
    for name, num in (("gone", "0 times"), ("everywhere", r"\d+ times .*and must once")):
        with pytest.raises(ValueError, match=f"'{name}' looks for what stands .*{num}"):
            mutation_check.mutated(SOURCE, name)


def test_what_is_called_equivalent_is_in_the_lists():
    automatic = mutation_check.automatic_mutations(SOURCE)
    assert len(automatic) > 300
    assert mutation_check.EQUIVALENT.keys() <= mutation_check.MUTATIONS.keys() | automatic.keys()


def test_what_does_not_compile_is_told():
    assert mutation_check.compiles(SOURCE.replace("return key ", "return  key "), SOURCE)
    assert not mutation_check.compiles(SOURCE.replace("return (key <= query)", "return key <= query)"), SOURCE)

"""list.txt: what a person writes into it, and what is said when it cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qbatch.core.domain import SourceRef
from qbatch.core.errors import ModelsRefused, UsageError
from qbatch.scheduler.model_list import read_models
from tests.model_lists import read_model_list


def names(text: str) -> list[str]:
    return [source.name for source in read_model_list(text.splitlines(), check_folders=False, roots=None)]


def a_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_blank_lines_and_comments_are_skipped() -> None:
    assert names("# ours\n\n  org/a  \n\t\norg/b # the small one\norg/c\t# by tab\n   # end") == [
        "org/a",
        "org/b",
        "org/c",
    ]


def test_a_path_may_hold_a_hash(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "a#1" / "#b")
    (source,) = read_model_list([f"{folder} # ours"], check_folders=True, roots=None)
    assert source == SourceRef(name=str(folder), location=str(folder), is_folder=True)


@pytest.mark.parametrize("name", ["my models (v2) #1", "# one", "a #b #c", r"a\#b"])
def test_a_hash_after_white_space_is_listed_with_a_backslash(name: str, tmp_path: Path) -> None:
    folder = a_model(tmp_path / name)
    written = str(folder).replace(" #", r" \#")
    (source,) = read_model_list([f"{written}  # ours"], check_folders=True, roots=None)
    assert source.location == str(folder)
    assert names(r"\# at the beginning/x/y") == ["# at the beginning/x/y"]


def test_a_name_that_ends_at_a_hash_says_how_to_write_it(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m (v2) #1")
    with pytest.raises(UsageError, match=r"m \(v2\) \(write \\# for a # of its name\)"):
        read_model_list([str(folder)], check_folders=True, roots=None)


def test_a_path_may_hold_blanks(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "my models" / "a b")
    (source,) = read_model_list([f"  {folder}  "], check_folders=True, roots=None)
    assert source.location == str(folder)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm() -> None:
    assert names("\ufefforg/a\r\norg/b\r\n") == ["org/a", "org/b"]


def test_a_model_named_twice_is_taken_once(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m")
    listed = ["org/a", str(folder), "org/a", f"{folder}/", "org/a@main", "org/a@v2", "org/a@main"]
    sources = read_model_list(listed, check_folders=True, roots=None)
    assert [(source.location, source.revision) for source in sources] == [
        ("org/a", None),
        (str(folder), None),
        ("org/a", "main"),
        ("org/a", "v2"),
    ]


def test_a_revision_follows_an_at_sign() -> None:
    (source,) = read_model_list(["org/a@refs/pr/1"], check_folders=False, roots=None)
    assert source == SourceRef(name="org/a", location="org/a", revision="refs/pr/1")


def test_problems_are_listed_by_line_number() -> None:
    with pytest.raises(UsageError) as caught:
        names("# a comment counts as a line\norg/a\nnot a model\n\norg/b@..\n")
    message = str(caught.value)
    assert "line 3:" in message
    assert "line 5:" in message
    assert "line 2" not in message


def test_all_problems_are_named_and_of_a_file_that_is_no_list_the_first() -> None:
    for count, more in ((20, 0), (120, 20)):
        with pytest.raises(ModelsRefused) as caught:
            names("\n".join(["org/model", *["not a model"] * count]))
        first, *others = caught.value.lines
        assert first == f"{count} of {count + 1} models cannot be used, so nothing was submitted:"
        assert len(others) == min(count, 100) + bool(more)
        assert others[0] == "  line 2: 'not a model' is neither a folder nor a hub id"
        assert (others[-1] == f"  and {more} more") == bool(more)
        assert "\n" not in str(caught.value)


def test_a_name_spelt_much_like_a_folder_is_not_taken_for_one_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_model(tmp_path / "models" / "tiny-llama")
    a_model(tmp_path / "gpt-2-mine")
    monkeypatch.chdir(tmp_path)
    for typed, meant in (("models/tiny-lama", "models/tiny-llama"), ("gpt-2-mien", "gpt-2-mine")):
        with pytest.raises(UsageError, match=f"no folder {typed}; did you mean {meant}.*write {typed}@main"):
            names(typed)
    with pytest.raises(UsageError, match=r"no such folder: \./models/tiny-lama; did you mean \./models/tiny-llama\?"):
        read_model_list(["./models/tiny-lama"], check_folders=True, roots=None)
    assert names("models/tiny-lama@main\nmodels/other\ngpt-3-mine\norg/model") == [
        *("models/tiny-lama", "models/other", "gpt-3-mine", "org/model")
    ]


@pytest.mark.parametrize(
    ("here", "asked"),
    [
        ("Helsinki-NLP/opus-mt-en-de", "Helsinki-NLP/opus-mt-en-fr"),
        ("google/gemma-2b", "google/gemma-2b-it"),
        ("bert-base-cased", "bert-base-uncased"),
        ("facebook/bart-base", "facebook/bart-large"),
        ("Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
    ],
)
def test_another_model_of_the_same_family_is_one_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str, asked: str
) -> None:
    """Of an organisation whose models are here in part, the others are still to be had."""
    a_model(tmp_path / here)
    monkeypatch.chdir(tmp_path)
    assert names(asked) == [asked]


@pytest.mark.parametrize("takes", [True, False])
def test_whoever_is_asked_decides_whether_the_folder_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes: bool
) -> None:
    a_model(tmp_path / "models" / "tiny-llama")
    monkeypatch.chdir(tmp_path)
    asked = []

    def take_folder(name: str, folder: str) -> bool:
        asked.append((name, folder))
        return takes

    listed = read_models(["models/tiny-lama"], check_folders=True, roots=None, take_folder=take_folder)
    assert asked == [("models/tiny-lama", "models/tiny-llama")]
    assert [(one.name, one.is_folder) for one in listed.sources] == [
        ("models/tiny-llama", True) if takes else ("models/tiny-lama", False)
    ]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("list.txt", "list.txt is a file, not the folder of a model; a list of models is read with --models list.txt"),
        ("lists/my list", "is a file, not the folder of a model; a list of models is read with --models lists/my list"),
        ("./models/one/model.safetensors", "is a file; name the folder of its model: models/one"),
        ("one-Q4_K_M.gguf", "one-Q4_K_M.gguf is GGUF, which qbatch does not read"),
        ("./models", r"\./models has no config\.json: it holds folders that have one: a, b, c and 1 more; list these"),
        ("./gguf", r"\./gguf has no config\.json: it holds GGUF, which qbatch does not read"),
    ],
)
def test_a_file_or_a_folder_of_others_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "one"):
        a_model(tmp_path / "models" / name)
    for folder in ("lists", "gguf", "models/empty"):
        (tmp_path / folder).mkdir()
    for file in ("list.txt", "lists/my list", "models/one/model.safetensors", "one-Q4_K_M.gguf", "gguf/x.gguf"):
        (tmp_path / file).touch()
    with pytest.raises(UsageError, match=said):
        read_model_list([], named=[typed], check_folders=True, roots=None)


def test_a_path_that_is_a_file_here_may_be_a_folder_of_the_workers(tmp_path: Path) -> None:
    (tmp_path / "one").touch()
    (source,) = read_model_list([str(tmp_path / "one")], check_folders=False, roots=None)
    assert source.is_folder


def test_a_folder_must_exist_only_where_workers_see_this_file_system(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"line 1: no such folder.*line 2: .*config.json"):
        read_model_list([missing, str(tmp_path / "empty")], check_folders=True, roots=None)
    (source,) = read_model_list([missing], check_folders=False, roots=None)
    assert source.is_folder


@pytest.mark.parametrize("text", ["", "\n \n", "# nothing\n"])
def test_a_list_without_a_model_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no model"):
        names(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=40) | st.from_regex(r"[a-z./~@# -]{0,20}", fullmatch=True), max_size=8), st.booleans())
def test_whatever_the_lines_hold_the_answer_is_sources_or_a_usage_error(lines: list[str], check: bool) -> None:
    try:
        sources = read_model_list(lines, check_folders=check, roots=None)
    except UsageError:
        return
    assert sources
    assert len({(source.location, source.revision) for source in sources}) == len(sources)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(["..", ".", "in", "out", "link", "gone", "~", ""]), min_size=1, max_size=8))
def test_no_path_however_written_leads_out_of_the_roots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: list[str]
) -> None:
    for name in ("in", "out"):
        (tmp_path / name / "in").mkdir(parents=True, exist_ok=True)
    if not (tmp_path / "in" / "link").is_symlink():
        (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "in")
    roots = (tmp_path / "in",)
    for text in ("/".join(parts), f"{tmp_path}/" + "/".join(parts)):
        try:
            sources = read_model_list([text], check_folders=False, roots=roots)
        except UsageError:
            continue
        for source in sources:
            assert not source.is_folder or Path(source.location).resolve().is_relative_to(roots[0].resolve())


def test_a_folder_outside_the_roots_is_named_by_its_line(tmp_path: Path) -> None:
    inside, outside = a_model(tmp_path / "in" / "m"), a_model(tmp_path / "out" / "m")
    with pytest.raises(UsageError, match=rf"^line 2: .*QBATCH_MODEL_ROOTS \({tmp_path}/[a-z]+\)$"):
        read_model_list([str(inside), str(outside)], check_folders=True, roots=(tmp_path / "in",))
    with pytest.raises(UsageError, match=r"line 1: .*another machine"):
        read_model_list([str(inside)], check_folders=False, roots=())
    assert read_model_list(["org/a"], check_folders=True, roots=())


def test_links_to_one_folder_are_one_model_as_it_was_named_first(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    links = [tmp_path / name for name in ("current", "stable")]
    for link in links:
        link.symlink_to(model)
    sources = read_model_list([str(path) for path in (*links, model)], check_folders=True, roots=None)
    assert [source.location for source in sources] == [str(links[0])]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/" + "x" * 100_000, "at most 4095 characters"),
        ("x" * 100_000, "at most 4095 characters"),
        ("{folder}/" + "x" * 300, "File name too long"),
    ],
    ids=["path", "id", "name"],
)
def test_a_place_that_is_too_long_is_named_in_short(line: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        read_model_list(["# a comment", line.format(folder=tmp_path)], check_folders=True, roots=None)
    assert str(caught.value).startswith("line 2: ")
    assert len(str(caught.value)) < 500

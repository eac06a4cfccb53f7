"""The report: what it says, what it refuses, and that it is one whole page of HTML."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from run_folders import dice_result, make_run

from medmoco.errors import UserError
from medmoco.report import main, next_command, read_run, write_plots, write_report
from medmoco.report.html import VOID_ELEMENTS, element, text
from medmoco.report.record import duration


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "full")


@pytest.fixture(scope="module")
def full_page(run_folder) -> str:
    return write_report([run_folder], run_folder.parent / "full.html").read_text("utf-8")


@pytest.fixture
def blank_plots(monkeypatch):
    """Drawing takes most of the time, and most tests are not about it."""
    monkeypatch.setattr("medmoco.report.figures.render_svg", lambda plot, theme: b"<svg/>")


def report(*folders: Path) -> str:
    return write_report(folders, folders[0].parent / "page.html").read_text("utf-8")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def visible(page: str) -> str:
    """The page's words: no tags, no images."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.split("</head>")[1]))


class Structure(HTMLParser):
    """Follows the nesting of tags and collects attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


# --- the page as HTML ---------------------------------------------------------------------------


def test_every_tag_is_closed_and_every_id_is_unique(full_page):
    structure = Structure(full_page)
    assert structure.open == []
    ids = [a["id"] for _, a in structure.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_page_loads_nothing_and_runs_its_own_script_alone(full_page):
    structure = Structure(full_page)
    assert not structure.all("link")
    ids = {a["id"] for _, a in structure.elements if "id" in a}
    for _, attributes in structure.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "srcset", "href"):
            address = attributes.get(name) or "data:"
            assert address.startswith("data:") or address.removeprefix("#") in ids
    assert "http:" not in full_page and "https:" not in full_page and "url(" not in full_page
    assert structure.all("script") == [{"type": "application/json", "id": "viewer-data"}, {}]
    policy = next(a["content"] for a in structure.all("meta") if "http-equiv" in a)
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    expected = {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'"}
    expected["form-action"] = "'none'"
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", full_page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        expected[f"{tag}-src"] = f"'sha256-{digest}'"
    assert directives == expected


def test_pictures_have_words_and_tables_have_captions_and_headings(full_page):
    structure = Structure(full_page)
    plots = [a for a in structure.all("img") if "src" in a]
    assert all(len(a["alt"]) > 20 for a in plots)
    assert all(a["aria-hidden"] == "true" for a in structure.all("svg"))
    assert len(structure.all("caption")) == len(structure.all("table")) > 4
    assert all("scope" in a for a in structure.all("th"))
    assert ("html", {"lang": "en"}) in structure.elements


def test_dark_and_light_versions_of_each_plot_are_there(full_page):
    structure = Structure(full_page)
    plots = [a for a in structure.all("img") if "src" in a]
    assert len(structure.all("source")) == len(plots) == 7
    for image in plots:
        drawing = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,"))
        assert b"<svg" in drawing and b"nan" not in drawing.lower().replace(b"nance", b"")


def test_same_folder_gives_the_same_bytes(run_folder, full_page):
    assert report(run_folder) == full_page


def test_page_stays_small(full_page):
    assert len(full_page) < 3_000_000


def test_values_are_escaped_and_control_characters_made_visible():
    assert text("a<b>&\"'\n\u202e\udc80") == "a&lt;b&gt;&amp;&quot;&#x27;\\n\\u202e\\udc80"
    assert element("td", "<", class_='"') == '<td class="&quot;">&lt;</td>'


def test_file_names_cannot_inject_markup(full_page):
    assert "<script>alert" not in full_page and full_page.count("<script") == 2
    assert "a&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;\\n\\u202e\\udc80" in full_page
    assert "spleen &lt;left&gt;" in full_page
    assert (
        "case &lt;b&gt;&quot;x&quot;\\n&lt;script&gt;alert(1)&amp;\\u202e: Dice 0.062" in full_page
    )


# --- what it says -------------------------------------------------------------------------------


def test_page_begins_with_one_sentence_on_what_was_run(full_page):
    assert (
        "A resnet18 of width 0.25 was pretrained with medmoco on data &lt;1&gt; for 3 epochs and "
        "tested on 13 volumes of task &amp; labels, seed 0."
    ) in visible(full_page)


def test_table_shows_dice_controls_and_rank(run_folder, full_page):
    summary = json.loads((run_folder / "summary.json").read_text())
    table = full_page[: full_page.index("</table>")]
    for result in (
        summary["linear"],
        summary["controls"]["linear_random"],
        summary["finetune"],
        summary["controls"]["finetune_scratch"],
    ):
        assert f"{result['dice_mean']:.3f}" in table
    assert "41.2" in table and "features of 200 \N{MULTIPLICATION SIGN} 64" in table
    assert "17.5" in table and "embeddings of 200 \N{MULTIPLICATION SIGN} 32" in table


def test_the_share_of_the_attainable_rank_is_that_of_the_centred_one(full_page):
    table = full_page[full_page.index("Diagnostics on held-out slices") :]
    words = re.sub(r"<[^>]+>", " ", table[: table.index("</table>")]).split()
    row = words[words.index("features,") :]
    # RankMe; N x D in three words; RankMe centred and its share of min(N - 1, D) = 64
    assert row[:4] == ["features,", "epoch", "0", "53.3"]
    assert row[7:9] == ["55.7", "0.87"]


def test_difference_of_one_seed_is_told_without_a_claim(tmp_path, blank_plots):
    folder = make_run(tmp_path / "run")
    scores = {"dice_per_volume": {"a": {"liver": 0.7}, "b": {"liver": 0.5}}}
    lower = {"dice_per_volume": {"a": {"liver": 0.6}, "b": {"liver": 0.6}}}
    edit(
        folder / "summary.json",
        linear={"dice_mean": 0.71, **scores},
        finetune={"dice_mean": 0.6, **scores},
        controls={
            "linear_random": {"dice_mean": 0.6, **lower},
            "finetune_scratch": {"dice_mean": 0.65, **lower},
        },
    )
    words = visible(report(folder))
    assert "0.600 for a frozen random encoder: 0.110 higher, higher on 1 of 2 test volumes" in words
    assert "0.650 for training from scratch: 0.050 lower" in words
    assert words.count("(one seed, no claim)") == 2


def test_missing_control_is_said(tmp_path, blank_plots):
    folder = make_run(tmp_path / "run")
    edit(folder / "summary.json", controls={})
    assert "A frozen random encoder, its control, was not run." in visible(report(folder))


def test_seeds_of_one_configuration_are_summed_up_as_mean_and_deviation(tmp_path, blank_plots):
    folders = [make_run(tmp_path / f"s{seed}", seed=seed) for seed in (0, 1, 2)]
    for folder, linear, random in zip(folders, (0.5, 0.6, 0.7), (0.5, 0.5, 0.6), strict=True):
        edit(
            folder / "summary.json",
            linear={"dice_mean": linear},
            controls={"linear_random": {"dice_mean": random}},
        )
    assert (
        "medmoco. Linear evaluation: Dice 0.600 ± 0.100 over 3 seeds (mean ± std); difference to "
        "a frozen random encoder 0.067 ± 0.058, positive in 2 of 3."
    ) in visible(report(*folders))


def test_classes_have_intervals_over_volumes_and_over_seeds(tmp_path, blank_plots):
    folders = [make_run(tmp_path / f"s{seed}", seed=seed) for seed in (0, 1)]
    for folder, liver in zip(folders, (0.5, 0.54), strict=True):
        scores = {"a": {"liver": liver - 0.01}, "b": {"liver": liver + 0.01}}
        result = {"dice_mean": liver, "dice_per_class": {"liver": liver}, "dice_per_volume": scores}
        edit(folder / "summary.json", linear=result, finetune=None, controls={})
    words = visible(report(*folders))
    # t of 0.975 with 1 degree of freedom, 12.706, times half the distance of two values
    assert "liver 0.500 0.373\N{EN DASH}0.627 0.540 0.413\N{EN DASH}0.667" in words
    over = words[words.index("medmoco: mean over 2 seeds") :]
    assert "liver 0.520 0.266\N{EN DASH}0.774 mean 0.520" in over


def test_folds_of_a_cross_validation_are_told(tmp_path, blank_plots):
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["folds"] = {"finished": [0, 1, 4], "of": 5}
    summary["finetune"]["folds"] = {"dice": {"0": 0.8, "1": 0.7, "4": 0.75}}
    summary["controls"]["linear_random"]["folds"] = {"dice": {"0": 0.25, "1": None, "4": 0.45}}
    summary["linear"]["folds"] = {"dice": {"0": 0.5}}
    (folder / "summary.json").write_text(json.dumps(summary))
    words = visible(report(folder))
    assert "Fine-tuning: Dice 0.750 ± 0.050 over 3 of 5 folds (mean ± std)" in words
    assert "Frozen random encoder: Dice 0.350 ± 0.141 over 2 of 5 folds" in words
    assert words.count("of 5 folds") == 2, "one fold has no spread"


def test_runs_of_different_methods_are_not_averaged(tmp_path, blank_plots):
    folders = [make_run(tmp_path / m, method=m, seed=i) for i, m in enumerate(("mocov2", "paper"))]
    page = visible(report(*folders))
    assert "mean ± std" not in page
    assert "mocov2: Linear evaluation" in page and "paper: Linear evaluation" in page


def test_runs_tested_on_different_volumes_are_not_to_be_compared(tmp_path, blank_plots):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", method="mocov2")]
    assert "do not compare" not in report(*folders)
    edit(folders[1] / "summary.json", finetune=dice_result(0.7, 0, volumes=9))
    assert "do not compare" in report(*folders)


def test_signs_of_collapse_stand_at_the_top_and_in_words(tmp_path, blank_plots):
    warning = "the loss stays within 5 % of log(K+1) <chance>"
    page = report(make_run(tmp_path / "run", warnings=(warning,)))
    assert "The features may have collapsed" in page[: page.index("<nav")]
    assert page.count("5 % of log(K+1) &lt;chance&gt;") == 1


def test_absence_of_signs_of_collapse_is_said(full_page):
    assert "None of the three signs of collapse" in visible(full_page)
    assert "may have collapsed" not in full_page


def test_volumes_come_worst_first_and_the_rest_is_folded(full_page):
    part = full_page[full_page.index('id="volumes"') : full_page.index('id="viewer"')]
    table = part[: part.index("</table>")]
    means = [float(v) for v in re.findall(r'scope="row">case[^/]+</th><td>([\d.]+)', table)]
    assert len(means) == 10 and means == sorted(means)
    assert "<summary>3 more</summary>" in part


def test_absent_classes_are_counted(full_page):
    assert "spleen &lt;left&gt; in 1 of 13 volumes (all models)" in visible(full_page)


def test_stages_are_timed_for_people(full_page):
    words = visible(full_page)
    assert "3 min 20 s" in words and "31.0 s" in words and "2 h 05 min" in words
    assert [duration(s) for s in (0.04, 59.96, 3600, None)] == [
        "0.0 s",
        "1 min 00 s",
        "1 h 00 min",
        "\N{EN DASH}",
    ]


def test_configuration_names_what_differs_between_runs(tmp_path, blank_plots):
    page = report(make_run(tmp_path / "a"), make_run(tmp_path / "b", width=0.5))
    part = page[page.index("What differs between the runs") :]
    table = part[: part.index("</table>")]
    assert '<th scope="row">width</th><td>0.25</td><td>0.5</td>' in table
    assert "arch" not in table


def test_runs_side_by_side_share_their_plots(tmp_path, blank_plots):
    page = report(make_run(tmp_path / "a"), make_run(tmp_path / "b", width=0.5))
    alt = next(a["alt"] for a in Structure(page).all("img") if "Pretraining loss" in a["alt"])
    assert "a: from" in alt and "b: from" in alt and "Chance, log(K+1): 6.24" in alt


def alt_of(page: str, title: str) -> str:
    return next(a["alt"] for a in Structure(page).all("img") if title in a["alt"])


def test_chance_stands_beside_the_loss_that_it_is_the_chance_of(tmp_path, blank_plots):
    alt = alt_of(report(make_run(tmp_path / "a")), "Pretraining loss")
    assert "a: from 2 to 2." in alt, "the global term, not the sum with the local one"


def test_fine_tuning_has_its_curve(tmp_path, blank_plots):
    page = report(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    alt = alt_of(page, "Fine-tuning loss")
    assert "a, fine-tuned: from 1 to 1; b, fine-tuned: from 1 to 1." in alt


def test_spectrum_ends_where_the_samples_do(tmp_path, blank_plots):
    folder = make_run(tmp_path / "a")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        if record["stage"] == "diagnostics":
            record["features"] |= {"samples": 4, "spectrum": [0.4, 0.2, 0.1, 1e-12]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert "smallest positive 0.1" in alt_of(report(folder), "Eigenvalues of the features")


def test_collapse_before_training_is_no_news(tmp_path, blank_plots):
    folder = make_run(tmp_path / "a")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for epoch, told in ((0, False), (1, True)):
        changed = [
            json.dumps(r | {"warnings": ["flat"]})
            if (r := json.loads(line))["stage"] == "diagnostics" and r["epoch"] == epoch
            else line
            for line in lines
        ]
        (folder / "metrics.jsonl").write_text("\n".join(changed) + "\n")
        assert ("Warnings at earlier epochs: 1." in visible(report(folder))) == told
        assert "epochs: 0" not in visible(report(folder))


def test_commands_break_between_words_alone(tmp_path, blank_plots):
    page = report(make_run(tmp_path / "a"))
    assert "<span>python</span> <span>-m</span> <span>medmoco.train</span> <span>--data" in page


# --- commands -----------------------------------------------------------------------------------


def test_commands_are_quoted_for_the_shell(tmp_path, blank_plots):
    run = read_run(make_run(tmp_path / "my run"))
    page = (
        visible(report(run.folder)).replace("&#x27;", "'").replace("&lt;", "<").replace("&gt;", ">")
    )
    assert "python -m medmoco.train --data 'data <1>' --seed 0" in page
    again = f"--config '{run.folder}/config.json' --output '{run.folder}-again'"
    assert f"python -m medmoco.train {again}" in page


def test_next_command_follows_from_what_the_run_lacks(tmp_path):
    full = make_run(tmp_path / "full")
    assert f"--seed 1 --output {full}-seed1 && python -m medmoco.report" in next_command(
        read_run(full)
    )
    (full / "summary.json").unlink()
    assert next_command(read_run(full)).endswith(f"--output {full} --resume")
    pretrained = make_run(tmp_path / "pretrained", command="pretrain")
    edit(pretrained / "summary.json", linear=None, finetune=None, controls={})
    assert f"segment --task DIR --encoder {pretrained}/encoder.pt" in next_command(
        read_run(pretrained)
    )
    phantom = make_run(tmp_path / "phantom", data=None, task=None)
    assert "--data DIR --task DIR" in next_command(read_run(phantom))


# --- runs that are not whole --------------------------------------------------------------------


def test_run_with_nothing_but_its_configuration_has_a_page(tmp_path, blank_plots):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    page = report(folder)
    assert Structure(page).open == []
    assert "The run has not finished: it wrote no summary.json." in visible(page)
    assert (
        "Nothing was recorded for: classes, volumes, viewer, collapse, curves, spectra"
        in visible(page)
    )
    assert write_plots(folder) == []


def test_interrupted_run_says_how_far_it_came(tmp_path, blank_plots):
    folder = make_run(tmp_path / "run", epochs=8)
    (folder / "summary.json").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"stage": "pretrain", "epo')
    words = visible(report(folder))
    assert "for 3 of 8 epochs" in words
    assert "The last line of metrics.jsonl is unfinished and was left out." in words


def test_segmentation_alone_has_a_page(tmp_path, blank_plots):
    folder = make_run(tmp_path / "run", command="segment", method=None)
    (folder / "metrics.jsonl").unlink()
    edit(folder / "summary.json", method=None, effective_rank=None, finetune=None, warnings=None)
    words = visible(report(folder))
    assert "used without pretraining of its own and tested on 13 volumes" in words
    assert "Linear evaluation: Dice" in words


def test_repeated_steps_of_a_resumed_run_count_once(tmp_path):
    folder = make_run(tmp_path / "run")
    whole = read_run(folder).pretrain
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:12] + lines[8:]) + "\n")
    assert read_run(folder).pretrain == whole


def test_nan_and_null_are_shown_as_nothing(tmp_path, blank_plots):
    folder = make_run(tmp_path / "run")
    broken = dice_result(0.5, 0) | {"dice_mean": float("nan")}
    broken["dice_per_class"] = {
        "liver": None,
        "spleen <left>": float("inf"),
        "kidney & ureter": 0.5,
    }
    edit(folder / "summary.json", linear=broken)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"stage": "pretrain", "epoch": 4, "step": 19, "loss": NaN, "acc1": null}\n')
    page = report(folder)
    assert not re.search(r"\b(nan|inf)\b(?! voxels)", visible(page), re.IGNORECASE)


# --- what is refused ----------------------------------------------------------------------------


def test_folder_that_is_no_run_is_named(tmp_path, blank_plots):
    with pytest.raises(UserError, match=rf"{tmp_path}: expected the folder of a run"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="nowhere: expected the folder of a run"):
        read_run(tmp_path / "nowhere")
    assert not (tmp_path / "report.html").exists()


def test_run_given_twice_is_refused(run_folder, tmp_path, blank_plots):
    with pytest.raises(UserError, match="got this one twice"):
        write_report([run_folder, run_folder / ".." / "full"], tmp_path / "report.html")


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_broken_json_is_named(tmp_path, name, content):
    folder = make_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: expected"):
        read_run(folder)


def test_broken_line_of_metrics_is_named(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text('{"stage": "pretrain"}\n{"stage"\n{}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: expected a readable JSON file"):
        read_run(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"linear": [1]},
        {"controls": 3},
        {"bad_files": ["name"]},
        {"linear": {"dice_per_volume": {"a": 1}}},
        {"classes": "liver"},
    ],
)
def test_summary_of_another_shape_is_named(tmp_path, change):
    folder = make_run(tmp_path / "run")
    edit(folder / "summary.json", **change)
    with pytest.raises(UserError, match=r"summary\.json: \w+ must"):
        read_run(folder)


# --- files --------------------------------------------------------------------------------------


def test_plots_are_written_into_the_run_folder(tmp_path):
    folder = make_run(tmp_path / "run")
    written = write_plots(folder)
    assert [path.name for path in written] == ["curves.png", "spectrum.png"]
    for path in written:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 1000
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write_plots(folder)] == before


def test_command_writes_beside_one_run_and_above_several(tmp_path, capsys, blank_plots):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)
    main([str(a)])
    assert (a / "report.html").is_file()
    main([str(a), str(b)])
    assert (tmp_path / "report.html").is_file()
    main([str(a), "--output", str(tmp_path / "x.html")])
    assert capsys.readouterr().out.endswith(f"report: {tmp_path}/x.html\n")


def test_output_in_a_folder_that_does_not_exist_is_named(run_folder, tmp_path, blank_plots):
    with pytest.raises(UserError, match=r"--output .*nowhere"):
        write_report([run_folder], tmp_path / "nowhere" / "report.html")

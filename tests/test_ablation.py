"""The ablation: its runs, its tables, and what its report makes of them."""

import csv
import fcntl
import json
import re
import shutil
import threading

import pytest

import ablation
import ablation_report
import ablation_tables
from ablation_run import drawn
from medmoco.data.splits import split_task, write_split
from medmoco.data.task import read_task
from medmoco.errors import UserError
from variants import FACTORIAL, RANDOM


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", autouse=True)
def few_pixels():
    """Linear decoders are fitted to these: thirteen organs take long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medmoco.linear.MAX_PIXELS", 2**11)
        yield


@pytest.fixture(scope="module")
def finished(few_pixels, tiny_task, tmp_path_factory):
    """The folder of a method and the control, one seed each, and the flags that made it."""
    folder = tmp_path_factory.mktemp("ablation")
    write_split(folder / "split.json", split_task(read_task(tiny_task)))
    flags = ["--quick", "--task", tiny_task, "--split", folder / "split.json", "--seeds", "3"]
    flags += ["--output", folder / "out", "--device", "cpu", "--variants", "zca", RANDOM]
    flags = [str(flag) for flag in flags]
    ablation.main(flags)
    return folder / "out", flags


def test_every_run_has_its_row(finished):
    zca, random = rows_of(finished[0] / "runs.csv")
    assert (zca["variant"], zca["seed"], random["variant"]) == ("zca", "3", RANDOM)
    for row in (zca, random):
        for column in ("linear_dice", "finetune_dice_1", "finetune_dice_2"):
            assert 0 <= float(row[column]) <= 1
    assert float(zca["loss_of_chance"]) == pytest.approx(
        float(zca["loss"]) / float(zca["chance"]), rel=1e-3
    )
    assert 1 <= float(zca["features_rankme"]) <= float(zca["dimensions"])
    assert random["loss"] == "" and random["features_rankme"] == ""


def test_dice_is_told_by_volume_class_and_model(finished):
    rows = rows_of(finished[0] / "dice.csv")
    test_volumes = {row["volume"] for row in rows}
    assert len(test_volumes) == 2
    for variant in ("zca", RANDOM):
        own = [row for row in rows if row["variant"] == variant]
        models = {(row["stage"], row["labels"], row["draw"]) for row in own}
        assert models == {
            ("linear", "8", "0"),
            *(("finetune", labels, draw) for labels in "12" for draw in "01"),
        }
        assert len(own) == len(models) * len(test_volumes) * len({row["organ"] for row in rows})


def test_every_epoch_of_a_pretraining_is_told(finished):
    folder, _ = finished
    start, end = rows_of(folder / "epochs.csv")
    assert [(row["variant"], row["epoch"]) for row in (start, end)] == [("zca", "0"), ("zca", "1")]
    assert start["loss"] == ""  # of an encoder that has not learned
    run = rows_of(folder / "runs.csv")[0]
    for column in ("loss_of_chance", "features_rankme", "embeddings_mean_share"):
        assert end[column] == run[column]
    assert start["features_rankme"] != end["features_rankme"]
    (spectra,) = map(json.loads, (folder / "spectra.jsonl").read_text().splitlines())
    assert (spectra["variant"], spectra["seed"]) == ("zca", 3)
    assert len(spectra["features"]) == int(run["dimensions"])


def test_what_has_its_row_is_not_run_again(finished, capsys):
    folder, flags = finished
    before = (folder / "runs.csv").read_text()
    ablation.main(flags)
    assert (folder / "runs.csv").read_text() == before
    assert "--- " not in capsys.readouterr().out


def test_runs_with_other_flags_are_not_mixed(finished):
    folder, flags = finished
    with pytest.raises(UserError, match=r"runs\.csv: expected rows with --set lr=0\.5, got other"):
        ablation.main([*flags, "--set", "lr=0.5"])
    row = rows_of(folder / "runs.csv")[0]
    assert "key_norm=shuffle" in row["settings"] and "temperature=0.1" in row["settings"]


def test_an_encoder_of_other_flags_is_not_taken(finished, tmp_path):
    folder, flags = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "runs.csv").unlink()
    known = json.loads((copy / "runs" / "zca-3" / "flags.json").read_text())
    (copy / "runs" / "zca-3" / "flags.json").write_text(json.dumps(known | {"temperature": 0.2}))
    flags = [str(copy) if flag == str(folder) else flag for flag in flags]
    with pytest.raises(UserError, match=r"flags\.json: expected the flags of this run"):
        ablation.main(flags)


def test_controls_that_need_the_test_volumes_are_not_cross_validated(tmp_path):
    flags = ["--output", str(tmp_path), "--quick", "--cross-validate", "--variants"]
    with pytest.raises(UserError, match="--cross-validate: expected variants or random, got atlas"):
        ablation.main([*flags, "atlas", "mocov2"])


def test_a_table_of_another_version_is_not_added_to(tmp_path):
    table = tmp_path / "runs.csv"
    table.write_text("variant,dice\nzca,0.5\n")
    with pytest.raises(UserError, match=r"runs\.csv: expected the columns of this version"):
        ablation.read_rows(table, ablation.columns([3]))


def test_a_task_is_needed_but_to_try_it_out(tmp_path):
    with pytest.raises(UserError, match="--task: expected the folder"):
        ablation.main(["--output", str(tmp_path)])


def test_more_labels_hold_the_fewer_and_draws_differ():
    train = tuple(f"case{i:02}" for i in range(30))
    assert set(drawn(train, 3, 0)) < set(drawn(train, 10, 0)) < set(drawn(train, 30, 0))
    assert drawn(train, 3, 0) != drawn(train, 3, 1) and drawn(train, 3, 1) == drawn(train, 3, 1)


# --- the report


def run_row(variant, seed, linear, loss=0.6, rank=20.0):
    row = dict.fromkeys(ablation.columns([3, 30]), "")
    row |= {"variant": variant, "seed": str(seed), "linear_dice": str(linear)}
    row |= {"finetune_dice_3": "0.5", "finetune_dice_30": "0.8"}
    if variant != RANDOM:
        row |= {"loss_of_chance": str(loss), "features_rankme_centred": str(rank)}
        row |= {"features_mean_abs_correlation": "0.2", "dimensions": "128"}
    return row


def test_means_and_ranges_stand_in_the_table():
    rows = [run_row("zca", 0, 0.4), run_row("zca", 1, 0.5), run_row(RANDOM, 0, 0.3)]
    lines = ablation_tables.variant_table(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| random", "| zca"]
    assert "| zca | 2 | 45.0 (40.0 to 50.0) | 50.0 (50.0 to 50.0) |" in lines[3]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (run_row("mocov2", 0, 0.35), ""),
        (
            run_row("mocov2", 0, 0.35, loss=0.96),
            "failed: the loss of 1 of 1 has hardly left chance",
        ),
        (run_row("mocov2", 0, 0.25), "failed: its probe is below that of random features"),
        (run_row(RANDOM, 0, 0.25), ""),
    ],
)
def test_no_claim_is_made_over_a_baseline_that_failed(row, why):
    assert ablation_tables.failure([row], 0.3) == why


def test_effects_have_intervals_from_five_seeds_on():
    def dice(seeds):
        values = dict(zip(FACTORIAL, (0.30, 0.34, 0.40, 0.47), strict=True))
        return [
            {"variant": v, "seed": str(s), "stage": "linear", "labels": "30", "draw": "0"}
            | {"volume": volume, "organ": "x", "dice": str(value)}
            for v, value in values.items()
            for s in range(seeds)
            for volume in ("a", "b")
        ]

    few, enough = (ablation_tables.effect_table(dice(seeds)) for seeds in (2, 5))
    assert "| decorrelation | linear decoder | +11.5 | - | - | fewer than 5 seeds |" in few
    line = "| decorrelation | linear decoder | +11.5 | +11.5 to +11.5 | < 0.001 | < 0.001 |"
    assert line in enough
    resting = ablation_tables.effect_table(dice(2), failed=["zca"])
    assert "| decorrelation (failed: zca) | linear decoder | +11.5 |" in resting
    assert "| both together | linear decoder |" in resting


def test_diagnostics_are_ranked_beside_dice():
    """Over the variants' means alike, over the runs not quite; nothing is said of two points."""
    rows = [
        run_row("mocov2", 0, 0.40, rank=10),
        run_row("local", 0, 0.42, rank=20),
        run_row("zca", 0, 0.44, rank=28),
        run_row("zca", 1, 0.46, rank=26),
        run_row(RANDOM, 0, 0.9),
    ]
    rows[0]["embeddings_rankme"] = rows[1]["embeddings_rankme"] = "3"
    table = ablation_tables.diagnostic_table(rows)
    assert "| diagnostic | over 3 variants | over 4 runs |" in table
    assert "| `features_rankme_centred` | +1.00 | +0.80 |" in table
    assert "| `embeddings_rankme` | - | - |" in table


def test_signs_of_collapse_stand_beside_the_dice_of_those_who_show_them():
    rows = [run_row("mocov2", 0, 0.40, loss=0.96), run_row("zca", 0, 0.50, loss=0.9)]
    rows += [run_row("zca", 1, 0.54, loss=0.8), run_row(RANDOM, 0, 0.9)]
    table = ablation_tables.sign_table(rows)
    expected = "| 1 runs: 40.0 (40.0 to 40.0) | 2 runs: 52.0 (50.0 to 54.0) |"
    assert f"| `loss_of_chance` above 0.95 {expected}" in table
    correlation = "`embeddings_mean_abs_correlation` above 0.6"
    assert f"| {correlation} | - | - |" in table


def test_trials_of_the_search_stand_in_a_table():
    rows = [run_row("medmoco", 0, 0.5), run_row("mocov2", 0, 0.4), run_row("medmoco", 0, 0.6)]
    rows[2]["settings"] = "lr=0.06"
    first, *lines = ablation_tables.search_table(rows).splitlines()[2:]
    assert first.startswith("| mocov2 | - | 40.0 | 0.60 |")
    assert lines[0].startswith("| medmoco | - | 50.0 |")
    assert lines[1].startswith("| medmoco | lr=0.06 | 60.0 |")


def test_fine_tunings_stand_beside_each_other():
    rows = [
        {"variant": variant, "steps": steps, "rate": "0.002", "dice": dice}
        for variant, steps, dice in [
            ("medmoco", "100", "0.5"),
            ("medmoco", "100", "0.6"),
            (RANDOM, "1000", "0.7"),
        ]
    ]
    lines = ablation_tables.finetune_table(rows).splitlines()
    assert lines[0] == "| steps | peak rate | random | medmoco |"
    assert lines[2] == "| 100 | 0.002 | - | 55.0 (50.0 to 60.0) |"
    assert lines[3] == "| 1000 | 0.002 | 70.0 | - |"


def test_the_report_writes_plots_and_tables(finished, capsys):
    folder, _ = finished
    ablation_report.main([str(folder)])
    told = capsys.readouterr().out
    assert re.search(r"\| zca \| 1 \| \d+\.\d \|", told)
    assert "cross-validated" not in told  # nothing was searched for
    for name in ("spectra.png", "dice_and_rank.png", "dice_and_labels.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"runs\.csv: expected a table of the ablation"):
        ablation_report.main([str(tmp_path)])


def test_flags_are_chosen_without_a_look_at_the_test_volumes(finished):
    folder, flags = finished
    before = (folder / "runs.csv").read_text()
    ablation.main([*flags[:-1], "--cross-validate", "--set", "lr=0.06", "crop_min=0.2"])
    (row,) = rows_of(folder / "search.csv")
    assert (row["variant"], row["flags"]) == ("zca", "crop_min=0.2 lr=0.06")
    assert 0 <= float(row["linear_dice"]) <= 1 and row["finetune_dice_1"] == ""
    assert (folder / "runs.csv").read_text() == before
    split = json.loads((folder.parent / "split.json").read_text())
    predicted = {path.name for path in folder.glob("runs/zca-3-crop*/fold-*/**/*.nii.gz")}
    assert predicted == {f"{case}.nii.gz" for case in split["train"]}


def test_an_unknown_flag_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        ablation.main(["--output", str(tmp_path), "--set", "rate=3"])
    assert "'rate=3': there is no such flag of pretraining" in capsys.readouterr().err


def test_writers_that_start_a_table_together_write_one_header(tmp_path):
    table, header = tmp_path / "runs.csv", ["variant", "seed"]
    second = threading.Thread(
        target=ablation.append, args=(table, header, [{"variant": "zca", "seed": 1}])
    )
    with table.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert ablation.read_rows(table, header) == []
        second.start()
        second.join(0.2)
        assert second.is_alive(), "it waits for the first one"
        file.write("variant,seed\nzca,0\n")
    second.join()
    assert [row["seed"] for row in ablation.read_rows(table, header)] == ["0", "1"]

"""
Write the table of families and claims in docs/families.md from what pytest wrote of its runs.

    python -m pytest tests/families -m "slow or not slow" --junitxml=claims/all.xml
    python scripts/claims_table.py claims

The folder may hold the files of several runs, such as one a test or a family; what none of them ran stays open.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
MARKERS = "<!-- claims: by scripts/claims_table.py -->", "<!-- end of claims -->"

CLAIMS = {
    "as the pipeline predicts": "test_the_prediction_is_what_the_pipeline_hands_to_its_scheduler",
    "noises": "test_latents_are_noised_as_the_pipelines_scheduler_noises_them",
    "decodes": "test_latents_are_decoded_as_the_pipeline_decodes_them",
    "rows apart": "test_a_rows_prediction_does_not_depend_on_the_other_rows",
    "begins at 0": "test_an_untrained_adapter_gives_a_log_ratio_of_exactly_zero",
    "begins at ln 2": "test_the_first_logged_loss_is_the_mean_weight_times_ln_2",
    "loads back": "test_a_fresh_pipeline_loads_exactly_what_was_trained_and_draws_the_same",
    "resumes": "test_stopping_and_resuming_equals_never_having_stopped",
    "recomputes": "test_gradient_checkpointing_runs_the_layers_twice_and_changes_neither_loss_nor_gradient",
    "learns": "test_eight_steps_on_one_batch_lower_the_loss_pull_positives_nearer_and_push_negatives_away",
    "bfloat16 base": "test_a_bfloat16_base_trains_a_float32_adapter_and_still_generates",
    "quantised base": "test_a_float32_adapter_trains_on_a_quantised_base_against_it_and_loads_into_it",
    "offloaded": "test_training_with_offloaded_blocks_is_the_same_to_the_bit",
}
"""Head of a column, and the test that it stands for."""

Outcomes = dict[tuple[str, str], set[str]]


def read_runs(files: Iterable[Path], twins: Iterable[str]) -> Outcomes:
    """
    Read what became of each test for each tiny pipeline.

    Args:
        files (`Iterable[Path]`): JUnit files of pytest.
        twins (`Iterable[str]`): Names of the tiny pipelines, which the tests have in their parameters.

    Returns:
        `dict`: "passed" and "failed", whichever occurred, by the names of the test and the pipeline.
    """
    names, found = sorted(twins, key=len, reverse=True), defaultdict(set)
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):  # noqa: S314 - pytest's own file
            if not (match := re.fullmatch(r"(\w+)\[(.+)\]", case.attrib["name"])) or case.find("skipped") is not None:
                continue
            test, values = match.groups()
            twin = next((name for name in names if re.search(rf"(^|-){re.escape(name)}($|-)", values)), None)
            if twin is not None:
                failed = any(case.find(kind) is not None for kind in ("failure", "error"))
                found[test, twin].add("failed" if failed else "passed")
    return dict(found)


def table(outcomes: Outcomes, pipelines: Mapping[str, str]) -> str:
    """
    Make the table: a row a pipeline, a column a claim.

    Args:
        outcomes (`dict`): As [`read_runs`] returns them.
        pipelines (`Mapping[str, str]`): The class of each tiny pipeline, by its name.

    Returns:
        `str`: Markdown. "yes" where the test passed for all tiny pipelines of a class, "no" where it failed for one,
        and a dash where it did not run for one.
    """
    lines = [f"| pipeline | {' | '.join(CLAIMS)} |", "|---" * (len(CLAIMS) + 1) + "|"]
    for kind in dict.fromkeys(pipelines.values()):
        cells = []
        for test in CLAIMS.values():
            ended = [outcomes.get((test, twin), set()) for twin, other in pipelines.items() if other == kind]
            failed = any("failed" in each for each in ended)
            cells.append("no" if failed else "yes" if all(ended) else "–")
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Write the page anew."""
    from tests.pipelines import TINY

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the JUnit files")
    files = sorted(parser.parse_args().folder.glob("*.xml"))
    pipelines = {name: type(facts.build()).__name__ for name, facts in TINY.items()}
    made = table(read_runs(files, pipelines), pipelines)
    start, end = MARKERS
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(start)
    PAGE.write_text(f"{before}{start}\n{made}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()

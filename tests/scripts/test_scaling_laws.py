"""tools/scaling_laws.py: the course's numbers, and formulas against searches and sums."""

import re

import pytest

from minillm.errors import UserError
from tools import scaling_laws
from tools.scaling_laws import PUBLISHED, REFITTED, effective_tokens, more_epochs

COURSE = ["--params", "67e9", "--tokens", "4.1e12"]


def test_the_courses_answers():
    found = scaling_laws.main([*COURSE, "--lower", "1%", "--grow", "1.41"])
    assert found["flops"] == pytest.approx(1.65e24, rel=2e-3)
    assert round(found["loss"], 2) == 1.90 and round(found["wanted"], 4) == 1.8766
    assert found["effective_tokens"] == pytest.approx(7.54e12, rel=1e-3)
    assert round(found["more_epochs"], 2) == 2.64
    assert found["flops_of_tokens_seen"] == pytest.approx(6.01e24, rel=2e-3)
    assert found["flops_of_effective_tokens"] == pytest.approx(3.03e24, rel=2e-3)
    assert round(found["epochs by tokens seen"], 2) == 2.58
    assert round(found["epochs by effective tokens"], 2) == 1.30


@pytest.mark.parametrize(("fit", "flops", "params", "tokens"), [
    (PUBLISHED, 1.65e24, 51.8e9, 5.31e12), (PUBLISHED, 5.76e23, 32e9, 2.98e12),
    (REFITTED, 5.76e23, 72e9, 1.33e12),
])  # fmt: skip
def test_the_published_optima(fit, flops, params, tokens):
    assert fit.optimum(flops) == pytest.approx((params, tokens), rel=0.01)


@pytest.mark.parametrize(("fit", "loss"), [(PUBLISHED, 1.8955), (REFITTED, 1.9507)])
def test_the_loss_of_the_courses_model(fit, loss):
    assert round(fit.loss(67e9, 4.1e12), 4) == loss


@pytest.mark.parametrize("fit", [PUBLISHED, REFITTED])
@pytest.mark.parametrize("flops", [1e18, 1e21, 1e24, 1e27])
def test_the_closed_form_is_the_minimum_that_a_search_finds(fit, flops):
    assert fit.optimum(flops) == pytest.approx(fit.searched_optimum(flops), rel=1e-5)


def test_more_epochs_are_worth_half_as_much_each():
    assert [effective_tokens(1.0, x) for x in range(4)] == [1.0, 1.5, 1.75, 1.875]
    assert more_epochs(8.0, effective_tokens(8.0, 2.3)) == pytest.approx(2.3)


@pytest.mark.parametrize("flags", ["--params 1e9 --flops 1e20", "--lower 1% --flops 1e20"])
def test_half_a_question_is_refused(flags):
    with pytest.raises(UserError, match="--params"):
        scaling_laws.main(flags.split())


def test_what_no_data_reaches_is_unreachable():
    with pytest.raises(UserError, match="unreachable"):
        scaling_laws.main([*COURSE, "--lower", "0.02"])
    with pytest.raises(UserError, match="do not reach it on any data"):
        scaling_laws.main([*COURSE, "--lower", "0.2"])


def test_the_tokens_for_a_loss_give_that_loss():
    assert PUBLISHED.loss(1e9, PUBLISHED.tokens_for(2.6, 1e9)) == pytest.approx(2.6)


def test_the_picture_is_drawn(tmp_path):
    scaling_laws.main([*COURSE, "--out-dir", str(tmp_path)])
    assert (tmp_path / "iso_loss.png").read_bytes().startswith(b"\x89PNG")


def test_shares_of_the_growth_sum_to_one_and_the_larger_one_is_the_faster(capsys):
    flags = [*COURSE, "--lower", "1%", "--grow"]
    for grow in ("1.05", "3"):
        scaling_laws.main([*flags, grow])
        for line in capsys.readouterr().out.splitlines():
            if "for the same C'" in line:
                n, d = (float(x) for x in re.findall(r"as C\^(-?[\d.]+)", line))
                assert n + d == pytest.approx(1, abs=0.011)
                assert line.endswith("faster" if d > n else "slower")


def test_tokens_of_a_parameter_are_told(capsys):
    found = scaling_laws.main(["--flops", "1e21"])
    lines = capsys.readouterr().out.splitlines()
    for (params, tokens), line in zip(found.values(), lines, strict=True):
        assert f"({tokens / params:.0f} each)" in line and tokens > params


def test_the_fits_are_the_published_ones():
    """Hoffmann et al. 2022, and Besiroglu et al. 2024."""
    numbers = [(f.irreducible, f.a, f.b, f.alpha, f.beta)
               for f in (scaling_laws.PUBLISHED, scaling_laws.REFITTED)]  # fmt: skip
    assert numbers[0] == (1.69, 406.4, 410.7, 0.34, 0.28)
    assert numbers[1][:3] == (1.8172, 482.01, 2085.43)

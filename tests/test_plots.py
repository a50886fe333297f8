"""Figures: the look, the colours, the Chinese font, the two helpers."""

import json
import os
import subprocess
import sys
import warnings

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

from matplotlib import pyplot as plt

from adlib import plots


@pytest.fixture(autouse=True)
def clean_figures():
    with mpl.rc_context():
        plots.style()
        yield
        plt.close("all")


def pixels(fig):
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())[..., :3].copy()


def test_the_look_is_set():
    assert mpl.rcParams["figure.dpi"] == 100 and mpl.rcParams["font.size"] >= 10
    assert mpl.rcParams["axes.prop_cycle"].by_key()["color"] == list(plots.COLOURS.values())


def test_the_colours_stay_apart_for_colour_blind_readers():
    # full deuteranopia and protanopia, Machado, Oliveira and Fernandes (2009), on linear RGB
    views = {
        "normal": np.eye(3),
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    }
    rgb = np.array([mpl.colors.to_rgb(colour) for colour in plots.COLOURS.values()])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for name, matrix in views.items():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
        gap = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + np.eye(len(seen))
        assert gap.min() > 0.12, name


def test_chinese_text_is_drawn_without_warnings(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig, ax = plt.subplots()
        ax.set_title("轻便保暖的羽绒服，点击率提高 −3.5 %（95 % 区间）")
        ax.set_xlabel("百褶裙、蕾丝、靓丽：¥1,299 ￥")
        drawn = pixels(fig)
        ax.set_title("□" * 10)
        ax.set_xlabel("")
        assert (drawn != pixels(fig)).any()
    assert not caplog.records


def test_the_font_needs_no_system_fonts(tmp_path):
    code = """
import json, warnings
warnings.simplefilter("error")
from matplotlib import ft2font, font_manager
from adlib import plots
plots.style(); plots.style()
fonts = [f.fname for f in font_manager.fontManager.ttflist if f.name == "adlib CJK"]
characters = set(ft2font.FT2Font(str(plots.CJK_FONT)).get_charmap())
print(json.dumps([len(fonts), sorted(characters)]))
"""
    bare = {"PATH": "", "HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path), "MPLBACKEND": "Agg"}
    env = {**{k: v for k, v in os.environ.items() if k in ("SYSTEMROOT", "PYTHONPATH")}, **bare}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr
    count, characters = json.loads(out.stdout.splitlines()[-1])
    assert count == 2, "registered once (for two weights), however often style() is called"
    level_1 = b"".join(bytes([row, cell]) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF))
    wanted = set(level_1.decode("gb2312", "ignore")) | set("，。！？：；、（）《》“”…￥０９ＡＺａｚ")
    assert len(wanted) > 3755 and {ord(character) for character in wanted} <= set(characters)


def test_the_font_is_small_and_its_licence_is_beside_it():
    assert plots.CJK_FONT.stat().st_size < 1_300_000
    licence = plots.CJK_FONT.with_name("OFL.txt").read_text(encoding="utf-8")
    assert "Copyright 2014-2021 Adobe" in licence and "SIL OPEN FONT LICENSE Version 1.1" in licence


def test_interval_plot():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = plots.interval_plot(
            ["模板", "tie", "none"], [3, 0.5, np.nan], [1, -1, np.nan], [6, 2, np.nan], xlabel="lift, %", title="A wins"
        )
        pixels(fig)
    ax = fig.axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["模板", "tie", "none"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first label is on top"
    assert (ax.get_xlabel(), fig.get_suptitle()) == ("lift, %", "A wins")
    points = [container.lines[0] for container in ax.containers]
    assert points[0].get_xdata().tolist()[0] == 3 and points[1].get_xdata().tolist() == [0.5]
    assert points[1].get_markerfacecolor() == "white", "an interval that holds the reference is hollow"


def test_interval_plot_without_reference_has_no_line():
    fig = plots.interval_plot(["a"], [1], [0], [2], xlabel="x", reference=None)
    assert not [line for line in fig.axes[0].lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"]


def test_interval_plot_says_what_is_wrong():
    with pytest.raises(ValueError, match="got 2 labels, 1 estimates, 1 lows and 1 highs"):
        plots.interval_plot(["a", "b"], [1], [0], [2], xlabel="x")
    with pytest.raises(ValueError, match='the estimate "b" lies outside its interval'):
        plots.interval_plot(["a", "b"], [1, 5], [0, 0], [2, 2], xlabel="x")


def test_curve_plot():
    x = np.arange(5)
    fig = plots.curve_plot(
        {"loss": (x, 5 - x), "损失": (x, 4 - x, 3 - x, 5 - x)}, xlabel="step", ylabel="nats", title="Falls"
    )
    pixels(fig)
    ax = fig.axes[0]
    assert len(ax.lines) == 2 and len(ax.collections) == 1 and ax.get_legend() is not None
    assert len({line.get_linestyle() for line in ax.lines}) == 2, "told apart without colour, too"
    with pytest.raises(ValueError, match="9 curves cannot be told apart"):
        plots.curve_plot({str(i): (x, x) for i in range(9)}, xlabel="", ylabel="")

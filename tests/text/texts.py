"""Texts that hypothesis builds: the ordinary, and all that has broken somebody's segmentation."""

from __future__ import annotations

from hypothesis import strategies as st

from pause_ray.text.pauses import PausePolicy

PIECES = [
    "The harbour was quiet that morning. ",
    "Nobody, not even Dr. Wu of the U.S. office, had expected 3.5 inches. ",
    "“Why?” she asked. ",
    "it went on and on without a stop ",
    "made them deep.The first programs",
    "at work.\n[1]No one doubts",
    "\n",
    "\n\n",
    "\r\n",
    "\r\n \r\n",
    "\n\n\n   ",
    "    def add(a, b):\n        return a.Sum(b)\n\n",
    "```\nx = System.Text.Json\n```\n",
    "- one\n- two\n",
    "1. First\n2. Second\n",
    "彼は走った。彼女は「待って！」と言った。",
    "é ñ n̈ 👩‍👩‍👧 \u200b\u00a0 ",
    "مرحبا. كيف حالك؟ ",
    "no final newline",
    "<PAUS",
    "E>",
    "<|im_end|>",
    "<<>>",
]
texts = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=25).map("".join),
    st.text(max_size=80),
    st.text(alphabet=" \n\r\t.A", max_size=40),
    st.just("a long paragraph without any end " * 60),
)

policies = st.one_of(
    st.builds(
        PausePolicy,
        unit=st.sampled_from(["paragraph", "sentence"]),
        paragraph_rule=st.sampled_from(["auto", "blank_line", "newline", "glued"]),
        every=st.integers(1, 4),
        count=st.integers(1, 3),
        marker=st.sampled_from(["<PAUSE>", " <PAUSE> ", "\n<PAUSE>", "⏸"]),
    ),
    st.builds(PausePolicy, unit=st.just("tokens"), unit_tokens=st.integers(1, 20), every=st.integers(1, 3), count=st.integers(1, 2)),
    st.builds(PausePolicy, placement=st.just("random"), rate=st.floats(1, 500)),
    st.builds(PausePolicy, placement=st.just("pattern"), pattern=st.sampled_from([r"\]", r"[.!?]", r"\s", r"(?<=a)b?"])),
)

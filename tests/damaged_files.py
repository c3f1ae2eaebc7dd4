"""Files as they come back damaged, for property tests of everything that reads what people edit."""

from __future__ import annotations

from hypothesis import strategies as st

ODD = (
    *(
        b"\0",
        b"\xff",
        b"\xfe\xff",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xe9",
        b"\xed\xa0\xbd",
        b"\xe2\x80\xa8",
        b"\xc2\xa0",
    ),
    *(
        b'"',
        b'""',
        b"'",
        b",",
        b";",
        b"\t",
        b"\r",
        b"\n",
        b"{",
        b"}",
        b"[",
        b"]",
        b"\\ud83d",
        b"\\u0000",
        b"NaN",
        b"1e999",
    ),
    *(b"sep=;\n", b"-----\n", b";;;;\n", b"<|im_end|>", b"#NAME?", b"=1+1", b"accept", b"same"),
)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with up to four pieces cut out, or put in, or in another encoding."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.sampled_from((0, 0, 1, 7, 300, len(data))))
        data = data[:at] + draw(st.sampled_from((b"", *ODD))) + data[end:]
    how = draw(st.sampled_from(("utf-8", "utf-8", "utf-8", "utf-16", "cp1252")))
    return data if how == "utf-8" else data.decode("utf-8", "replace").encode(how, "replace")

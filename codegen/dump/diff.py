"""Diffs of printed programs as HTML: unified, with signs as well as colours."""

from __future__ import annotations

from difflib import unified_diff
from html import escape

from depthc.codegen.dump.words import counted

CONTEXT = 3
SHORT = 80  # lines of a diff that is open from the start


def diff_html(before: str, after: str) -> str:
    """What changed from one text to another, in a <details> whose summary counts the lines.

    Example:
        >>> print(diff_html("a\\nb\\n", "a\\nc\\n"))
        <details open><summary>1 line added, 1 removed</summary>
        <pre tabindex="0"><code><span>  a</span><span class="gone">- b</span><span class="add">+ c</span></code></pre>
        </details>
    """
    lines = list(unified_diff(before.splitlines(), after.splitlines(), n=CONTEXT, lineterm=""))[2:]
    if not lines:
        return '<p class="muted">The program\'s text is the same.</p>'
    added, removed = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    shown = lines[1:]  # without the place of the first hunk
    opened = " open" if len(shown) <= SHORT else ""
    said = f"{counted(added, 'line')} added, {removed:,} removed"
    spans = "".join(map(_span, shown))
    return f'<details{opened}><summary>{said}</summary>\n<pre tabindex="0"><code>{spans}</code></pre>\n</details>'


def _span(line: str) -> str:
    if line.startswith("@@"):
        return '<span class="skip">  …</span>'
    kind = {"+": ' class="add"', "-": ' class="gone"'}.get(line[0], "")
    return f"<span{kind}>{line[0]} {escape(line[1:])}</span>"

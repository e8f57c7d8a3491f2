"""The looks of the page."""

STYLE = """
:root { --ink: #1d2326; --soft: #5b6468; --line: #d9dee0; --accent: #1f6f8b; --bad: #c8553d; --good: #6a8d2f; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 "Source Sans 3", "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .8rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p { max-width: 46rem; margin: .5rem 0 .9rem; }
.scope, .note, figcaption, caption { color: var(--soft); }
.note, figcaption { font-size: .9rem; max-width: 46rem; }
.verdict { border-left: 3px solid var(--accent); padding-left: .9rem; }
.remark { border-left: 3px solid var(--bad); padding-left: .9rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .9rem .32rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; }
tbody th { font-weight: 400; }
figure { margin: 1.2rem 0 1.8rem; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { margin-top: .4rem; }
details summary { cursor: pointer; color: var(--accent); margin: .8rem 0; }
.text th, .text td { text-align: left; }
.sheet td, .sheet td:first-child { border: 0; padding: .15rem 0 .5rem; width: 86px; min-width: 86px; text-align: center;
  font-size: .75rem; color: var(--soft); }
.sheet td span { display: block; line-height: 1.2; margin-top: .15rem; }
.sheet img { image-rendering: pixelated; border: 3px solid transparent; width: 62px; height: 62px;
  display: inline-block; }
.sheet .query, .sheet td.query:first-child { padding-right: 1.6rem; color: var(--ink); font-weight: 600; }
.sheet .right img { border-color: var(--good); }
.sheet .wrong img { border-color: var(--bad); }
.sheet .wrong { color: var(--bad); }
"""

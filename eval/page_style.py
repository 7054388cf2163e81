"""The page's style sheet: system fonts, few colours, light and dark, readable on a phone."""

STYLE = """
:root {
  --paper: #fdfdfc; --card: #ffffff; --ink: #1b1f24; --muted: #646b73; --line: #e3e6e9;
  --accent: #2f6f9f; --soft: #a9c4d8; --yes: #1f7a4d; --no: #b3423a; --think: #f5f6f7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1b1f23; --ink: #e6e8ea; --muted: #98a0a8; --line: #2c3238;
    --accent: #7fb3d9; --soft: #3f5a70; --yes: #5fc08f; --no: #e5857c; --think: #16191c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2.1rem; line-height: 1.15; margin: 0 0 .4rem; letter-spacing: -.015em; }
h2 { font-size: 1.2rem; margin: 3rem 0 .8rem; letter-spacing: -.005em; }
p { margin: 0 0 1rem; max-width: 70ch; }
small { color: var(--muted); font-size: .85em; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .84rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.kicker { color: var(--muted); font-size: .85rem; margin: 0 0 .3rem; }
.facts { color: var(--muted); margin-bottom: 1.6rem; }
.facts b { color: var(--ink); font-weight: 600; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); margin: 0;
  border-top: 1px solid var(--line); border-bottom: 1px solid var(--line);
}
.tiles div { display: flex; flex-direction: column-reverse; justify-content: flex-end;
  padding: .9rem 1rem .9rem 0; }
.tiles dd { margin: 0; font-size: 1.65rem; font-weight: 600; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.tiles dt { color: var(--muted); font-size: .85rem; line-height: 1.35; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1.5rem; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--muted); font-size: .82rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .92rem; }
th, td { padding: .45rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th { color: var(--muted); font-weight: 500; font-size: .84rem; }
tbody th { font-weight: 600; }
th:first-child, td:first-child { padding-left: 0; }
.text { text-align: left; font-weight: 400; white-space: normal; color: var(--muted);
  font-size: .84rem; }
.bar { display: inline-block; vertical-align: middle; width: 90px; height: 6px;
  margin-right: .7rem; border-radius: 3px;
  background: linear-gradient(to right, var(--accent) var(--share), var(--line) 0); }
td small { display: inline-block; min-width: 2.6rem; text-align: left; }
td.text { min-width: 15rem; }
.share { display: inline-block; min-width: 3.6rem; }
.grid { width: auto; margin-bottom: 1.5rem; }
.grid .text { color: var(--ink); white-space: nowrap; padding-right: 1.5rem; }
.grid td, .grid thead th:not(.text) { text-align: center; min-width: 3.2rem; }
.yes { color: var(--yes); font-weight: 700; }
.no { color: var(--no); font-weight: 700; }
details.step { border-top: 1px solid var(--line); padding: .2rem 0; }
details.step > summary { cursor: pointer; padding: .55rem 0; font-weight: 600; }
.marks { margin-left: .8rem; letter-spacing: .25em; }
article { background: var(--card); border: 1px solid var(--line); border-left: 3px solid var(--no);
  border-radius: 6px; margin: .6rem 0 1.2rem; overflow: hidden; scroll-margin-top: 1rem; }
article.right { border-left-color: var(--yes); }
article:target { box-shadow: 0 0 0 2px var(--accent); }
article header { display: flex; flex-wrap: wrap; gap: .1rem .8rem; align-items: baseline;
  padding: .55rem .9rem; font-size: .88rem; border-bottom: 1px solid var(--line); }
.verdict { font-weight: 600; color: var(--no); }
.right .verdict { color: var(--yes); }
.reason { color: var(--muted); }
.meta { margin-left: auto; color: var(--muted); font-variant-numeric: tabular-nums; }
.prompt, .answer { padding: .7rem .9rem; }
.prompt pre + pre { margin-top: .5rem; }
.thinking { background: var(--think); border-top: 1px solid var(--line);
  border-bottom: 1px solid var(--line); }
.thinking summary { cursor: pointer; padding: .4rem .9rem 0; color: var(--muted);
  font-size: .8rem; }
.thinking[open] summary { padding-bottom: .2rem; }
.thinking:not([open]) summary { padding-bottom: .4rem; }
.thinking pre { color: var(--muted); padding: 0 .9rem .7rem; }
.thinking pre, .answer pre { max-height: 19rem; overflow-y: auto; }
.answer pre { color: var(--ink); font-weight: 600; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line);
  color: var(--muted); font-size: .82rem; }
footer p { margin: 0 0 .3rem; max-width: none; }
@media (max-width: 560px) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.6rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tiles dd { font-size: 1.3rem; }
  .bar { display: none; }
}
@media print { .thinking pre, .answer pre { max-height: none; } }
"""

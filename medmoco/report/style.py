"""The style sheet of the report, for wide and narrow windows, light and dark."""

STYLE = """
:root {
  --paper: #ffffff; --raised: #f5f7fa; --ink: #1c2430; --soft: #56606e; --line: #d8dde4;
  --accent: #00609c; --warn-ground: #fff4e0; --warn-edge: #b86e00; --good-edge: #007a59;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181e; --raised: #1d232b; --ink: #e6e9ee; --soft: #a4adb9; --line: #343c47;
    --accent: #74c2f2; --warn-ground: #33270f; --warn-edge: #e6a23c; --good-edge: #2fc49a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.22rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
p { margin: .4rem 0 .8rem; }
.lead { font-size: 1.08rem; }
.kicker { color: var(--accent); font-weight: 650; margin: 0; }
.soft, figcaption, caption { color: var(--soft); }
a { color: var(--accent); }
nav ul {
  display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0;
  margin: 1rem 0 0;
}
nav a { display: inline-block; padding: .25rem 0; }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1.4rem; }
.frame { overflow-x: auto; margin: .6rem 0 1rem; }
.frame:focus-visible, pre:focus-visible, summary:focus-visible, a:focus-visible,
select:focus-visible, input:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px;
}
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .94rem; }
caption { text-align: left; padding-bottom: .35rem; font-size: .9rem; }
th, td {
  padding: .38rem .8rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line);
}
th:first-child, td:first-child { padding-left: .5rem; }
thead th { font-weight: 600; background: var(--raised); vertical-align: bottom; }
tbody th { font-weight: 500; overflow-wrap: break-word; min-width: 6rem; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; }
.numbers thead th[colspan] { text-align: center; }
.main thead tr + tr th:first-child { text-align: right; padding-left: .8rem; }
.words tbody th, .words td { overflow-wrap: anywhere; min-width: 9rem; max-width: 34rem; }
.words tbody th { min-width: 10.5rem; }
.main { width: 100%; font-size: 1rem; }
.main td { font-size: 1.06rem; }
th small, td small {
  display: block; font-size: .82rem; font-weight: 400; color: var(--soft);
  white-space: nowrap;
}
tr.marked th, tr.marked td { background: var(--raised); font-weight: 650; }
.note {
  border-left: 4px solid var(--line); background: var(--raised); padding: .7rem 1rem;
  margin: .8rem 0; border-radius: 0 6px 6px 0;
}
.note.warn { border-color: var(--warn-edge); background: var(--warn-ground); }
.note.good { border-color: var(--good-edge); }
.note p, .note ul { margin: .15rem 0; }
.note ul { padding-left: 1.2rem; }
.numbers td { white-space: nowrap; }
.pairs { display: grid; gap: 0 2.5rem; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 900px) { .pairs { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.plots {
  display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr));
}
figure { margin: 0; }
figure h3 { margin: 0 0 .2rem; font-size: .95rem; }
figure img { display: block; width: 100%; max-width: 440px; height: auto; }
figcaption { font-size: .86rem; overflow-wrap: anywhere; margin-top: .25rem; }
.controls { display: grid; gap: .6rem 1.6rem; margin: .8rem 0; align-items: end; }
@media (min-width: 700px) { .controls { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); } }
.controls div > label { display: block; font-size: .9rem; color: var(--soft); }
.controls fieldset {
  border: 0; margin: 0; padding: 0; min-width: 0; display: flex; flex-wrap: wrap;
  gap: .1rem 1.3rem; grid-column: 1 / -1;
}
.controls fieldset label, .legend label {
  display: inline-flex; align-items: center; gap: .45rem; min-height: 2rem;
}
select, input { font: inherit; accent-color: var(--accent); }
select {
  width: 100%; min-height: 2.3rem; padding: .35rem .5rem;
  background: var(--raised); color: var(--ink); border: 1px solid var(--line); border-radius: 6px;
}
.slide { display: flex; align-items: center; gap: .8rem; min-height: 2.3rem; }
.slide input { flex: 1; min-width: 0; margin: 0; height: 1.6rem; }
.slide span { white-space: nowrap; font-variant-numeric: tabular-nums; min-width: 8.5rem; }
.panels {
  display: grid; gap: .8rem .6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(46%, 205px), 1fr));
}
.panel[hidden] { display: none; }
.panel { max-width: 420px; }
.panel div { position: relative; background: #000; border-radius: 4px; overflow: hidden; }
.panel img, .panel canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.panel img { max-width: none; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.legend {
  display: flex; flex-wrap: wrap; gap: .4rem .7rem; list-style: none; padding: 0;
  margin: .8rem 0 1rem;
}
.legend[hidden] { display: none; }
.legend li {
  display: flex; align-items: center; gap: .45rem; background: #000; color: #fff;
  padding: .1rem .6rem; border-radius: 4px; font-size: .88rem; min-height: 2rem;
}
.legend svg { width: 28px; height: 10px; flex: none; }
.legend line { stroke-width: 3.5; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--accent); padding: .25rem 0; }
pre {
  background: var(--raised); border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem .9rem; margin: .4rem 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
}
pre span { display: inline-block; max-width: 100%; }
code { font: .9rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .86rem; }
@media (max-width: 560px) {
  main { padding: 1.1rem .9rem 3rem; }
  h1 { font-size: 1.35rem; }
  th, td { padding: .34rem .5rem; }
  .main, .main caption, .main tbody { display: block; }
  .main thead { position: absolute; width: 1px; height: 1px; overflow: hidden; opacity: 0; }
  .main tr { display: block; border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; }
  .main tbody th, .main td { display: block; border: 0; padding: .25rem .7rem; }
  .main tbody th { background: var(--raised); padding: .5rem .7rem; font-weight: 650; }
  .main td { display: flex; justify-content: space-between; gap: 1rem; flex-wrap: wrap; }
  .main td::before {
    content: attr(data-label); color: var(--soft); font-size: .94rem; font-weight: 400;
  }
}
@media print {
  .frame { overflow: visible; }
  section, figure { break-inside: avoid; }
}
"""

"""Speed, as ratios: `python -m benchmarks.speed [--device cuda|cpu] [--smoke] [--rows N ...] [--out DIR]`.

One Markdown table, and JSON beside it. Every ratio is measured side by side in one run: its two sides alternate, the
median of several rounds stands in the table with the lowest and the highest. Seconds are given on a GPU alone; on a
CPU, which others use as well, only ratios mean something. What both sides compute is compared before it is timed.

1 Recording       recording.py        `pipe(...)` under the recorder over plain `pipe(...)`
2 Heatmap         heatmap.py          a loop over layers, steps and heads that resizes each map, over `heatmaps`
3 Token           token.py            the same loop with autograd over `optimize`, an epoch and to the same loss
4 Self-attention  self_attention.py   column sums against materialised attention, and other ways without it
5 Page            page.py             start of the server to the first page; changed words to new pictures
                  starting.py         its first page over the imports; commands without torch over that of torch
6 Growth          growth.py           with tokens, steps, image side and batch
7 Many prompts    many_prompts.py     a dry run over reading the file; memory and time of 100,000 prompts over 1,000
8 Question        question.py         words to maps of the embedded model beside the published code, and its parts

Rows 2, 3, 6 and a part of 8 ask synthetic recordings of SD 1.5's shapes (synthetic.py). A CPU gets fewer steps, and
float32 queries, as it would keep them; CUDA gets 30 steps in float16 (sizes.py). published.py is the published code's
way, written anew.
"""

"""The text of the page, written before the runs; :mod:`.report` fills in what the rows say."""

__all__ = ["PAGE", "PILOT"]

PILOT = """\
with claims to lots that must not overlap, whether a quarrel spoils the deal, loses the lot or halves it, and also
  where payoffs regard the other's, unregularised training ended at a convention in which one agent or both looked
  at nothing, and no attack had any effect; hence the barter. There, 150 updates on 16 games with inner steps of
  half a radius left policies at 0.4 to 0.6 of the optimum, and λ = 0.03 and 0.3 of a joint AAJR penalty without
  clipping let single gradients 40 to 600 times the median stall the training; hence the clipping. With it, at 110
  updates on two seeds, λ = 0.01 and 0.1 of AAJR had about the variance of no penalty and a somewhat **smaller**
  robust payoff (0.25 to 0.27 against 0.30); hence the smaller weights. Updates (110 to 80), weights (3 to 2) and
  the random direction were cut before the runs for want of computing time."""

PAGE = """# Two agents

`python -m experiments two-agents` ({seeds} seeds). {environment}

## Question

Two language models barter, and each perturbs what the other sees. Does a penalty on the sensitivity of both
policies together steady their simultaneous training, and what is left of their payoffs under attack: without a
penalty, with a global one, and along the adversaries' direction, taken as one joint direction or as one per agent?

## Protocol

- The game: each agent holds one lot of each of {lots} types, of 1 to {counts} items, worth 0 to {values} each to
  itself (private). Both ask for a lot, hear what the other asks for, and hand over a lot. Profit is what an agent
  gets less what it gives, as a share of all it holds; its payoff is (own profit + {regard:g} · the other's) /
  {total:g}. Payoffs differ and interests are opposed in part. Handing over the same lot is no trade, so that no
  convention pays that looks at nothing.
- Payoffs are exact: given both observations the two gifts are independent, each a mixture over the other's
  requests, so that the expected payoff is bilinear in two distributions. No sampling enters a gradient.
- Each policy is a Llama of Hugging Face with random weights, {model[layers]} layers of width {model[width]}, that
  reads sizes and values as tokens and answers on the logits of the lots' tokens. Embeddings are random and frozen,
  else a policy could escape a ball of fixed radius by larger embeddings.
- The adversaries: each agent moves the embeddings of the other's observation in an l2 ball of radius {radius:g} (a
  token's embedding has a length of about {token:.1f}), to lower the other's payoff: ascent on −payoff_A(o_A + δ_A,
  o_B) − payoff_B(o_A, o_B + δ_B). The victim's own payoff and not the perturber's: its minimum is what robustness
  means. And the partner at its true observation: then the gradient at o_A is that of A's payoff alone, and still
  that of one function, for which monotone steps and curvature are defined. {steps} normalised steps of {step:g}
  radii per agent, from the true observation.
- Training from scratch, {updates} updates of Adam (learning rate {rate:g}) on {batch} fresh games each, both agents
  at once, each on its own (clean + w · attacked payoff) / (1 + w) + {temperature:g} · entropy, the other held
  fixed; plus λ · penalty of the composite policy (o_A, o_B) → log-probabilities of both gifts, at the points of
  that same ascent, whose gradient reaches both policies. Gradients are clipped to norm {clip:g}. A seed fixes
  starts and games for all methods alike.
- All penalties are in the Fisher metric of both gifts and differ in direction alone: Frobenius (one random draw),
  spectral ({iterations} power iterations), AAJR joint (one tangent, norm 1 per agent), AAJR per agent (two tangents
  that share the primal, the mean of both). A random direction was left out to fit the time there was: in
  expectation it is Frobenius up to a factor, and [on digits](digits.md) the two agreed.
- Runs per method and seed: λ = {weights} at w = 1, in units of 1 over the penalty of policies trained without one
  (geometric mean over pilot seeds 100 to 102); without a penalty w = {mixes} instead. Tested is the run with the
  largest clean plus robust joint payoff on {games} validation games (10 attack steps).
- Stability, of the tested runs: variance of the attacked joint payoff, as a share of the batch's optimum, over the
  last third of the updates; jitter, half its mean squared change there, in which trends hardly enter; the largest
  drop of its mean over 10 updates below an earlier one; the gradient norm's 99 % quantile over its median, before
  clipping. Collapsed: not finite, or a clean share in the last third below half that of agents who hand over their
  least valued lot without listening. Non-monotone: inner steps of training that lower the loss they climb; after:
  the same on 64 test games, and κ, the largest negative curvature that the ascent meets, mean over games.
- Robust payoff, {games} test games: the smallest payoff of each agent, when its own observation alone is attacked,
  at any point of {strong[steps]} steps of {shares} radii, {strong[restarts]} uniform starts each; joint: the sum
  over agents.
- Primary: paired differences of variance, non-monotone fraction and robust joint payoff, mean over seeds, 95 %
  percentile bootstrap interval over seeds (10,000 resamples). Everything else is secondary; intervals are not
  corrected for their number. This analysis was committed before the runs; game, learning rate, radius and weights
  come from a pilot on other seeds (100 and up).
- What the pilot saw: {pilot}

## Result

![Payoff under attack during training, clean and robust payoffs, paired differences](two-agents.png)

Means over seeds of the tested runs; w or λ: geometric mean of the chosen one.

{means}

Paired differences; bold where the interval leaves out zero. More is better for payoffs and the share, less for the
rest.

{differences}

{verdicts}

{play} The environment is a parallel one of PettingZoo (`experiments/two_agents/environment.py`).

Written after the runs: at these weights and this length of training no penalty raised the mean of either payoff,
and every penalty lengthened the mean tail of the gradient norm. A likely cause, which was not examined, is that few
games where a policy is about to change its mind dominate the Fisher sensitivity; gradients clipped there cost learning
elsewhere. What AAJR bought is fewer falling inner steps.

## A pretrained model

SmolLM2-135M-Instruct, frozen, with a LoRA adapter of rank {language[rank]} per agent; observations are a line of
text ("You have 2 hats worth 3, ..."), answers single letters, {language[game][lots]} types of lots.
{language[updates]} updates on {language[batch]} games each, {language[inner][steps]} inner steps, a radius of
{language[radius]:g} times the mean length of a token's embedding, λ = {language[weight]:g} over the penalty at the
start; payoffs on {language[games]} test games, a short attack of {language[attack][steps]} steps. **One seed: it shows
that the method runs on two adapters of a language model, and carries no statistical claim.** So few updates do not
teach the game: what the two cores allowed is a measure of cost, not of payoffs.

{language_table}

## Limits

One small game, one architecture of toy size, one radius; the adversaries act in embedding space, and no text need
correspond to what the victims see. Training is short: policies are still improving at the end, so that variance
over the last third holds some trend (jitter holds less). Two weights per method and one choice rule are a coarse
search; a method whose best λ lies elsewhere is underrated. The composite penalty is shared: through it an agent's
update serves the other's steadiness, which payoffs of its own would not ask for. Between joint and per-agent
direction the Fisher matrix differs only by what requests carry from one agent's observation to the other's gift;
where requests are hardly heard, the joint penalty is twice the per-agent one, and with λ in units of the penalty
both are the same method. Bootstrap intervals over {seeds} seeds are somewhat too narrow.
"""

"""ReNoise, arXiv 2403.14602, section 3 and algorithm 1: a fixed number of iterations, then a step with an average."""

from __future__ import annotations

from smpo_pipeline.inversion.step import Solution, Step
from smpo_schemas.inversion_settings import InversionSettings, averaged_estimates


def renoise(step: Step, settings: InversionSettings) -> Solution:
    """e_0 = d(x_s, t), e_i = d(F(x_s, e_{i-1}), t); the step is taken with the mean of the chosen e_i.

    With one iteration and both estimates averaged (the default), it is what the published SmPO code does.
    """
    averaged = averaged_estimates(settings.renoise_average, settings.renoise_steps)
    rows = step.all_rows()
    estimate = step.predict(step.x_s_RChw, rows)
    total = estimate * (0 in averaged)
    for index in range(1, settings.renoise_steps + 1):
        estimate = step.predict(step.carried(estimate, rows), rows)
        if index in averaged:
            total = total + estimate
    return Solution(step.carried(total / len(averaged), rows), None)

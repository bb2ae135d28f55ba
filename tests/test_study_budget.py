"""The sensitivities of a study's blocks."""

import pytest
import torch

from eacmoe_lightning.study.budget import fit_sensitivity, frequencies


def test_sensitivities_are_the_slopes():
    cells = [(3, x, 2.0 * x) for x in (0.1, 0.2, 0.4)] + [(5, x, 0.5 * x) for x in (0.1, 0.3)]
    fitted = fit_sensitivity(cells)
    assert fitted.nats == {3: pytest.approx(2.0), 5: pytest.approx(0.5)} and fitted.explained == pytest.approx(1)
    assert fit_sensitivity([*cells, (6, 0.1, -0.2)]).nats[6] == pytest.approx(0.5)  # a gain counts as the least loss
    with pytest.raises(ValueError, match="lost anything"):
        fit_sensitivity([(0, 0.1, -1e-4)])
    assert frequencies(torch.tensor([0, 3])).tolist() == [0.2, 0.8]

"""Suppression: what share of the concept is gone, compared with what the unedited model shows of it."""

from collections.abc import Mapping

from unlearning.store.metrics import Metric

OF = ("efficacy/nudenet_rate", "efficacy/acc_e")  # the first of these that was measured


def suppression(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """100 (1 - erased / base), of the rate of detections or of accuracy; empty if neither was measured on both."""
    for name in OF:
        metric = metrics.get(name)
        if metric and metric.base and metric.value is not None:
            protocols = dict.fromkeys(p or "not stated" for p in (metric.protocol, metric.base_protocol))
            value = 100 * (1 - metric.value / metric.base)
            return {"efficacy/suppression": Metric(value, f"of {name}: {' | '.join(protocols)}")}
    return {}

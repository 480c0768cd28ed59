"""A training session in words: its events and its summary as lines of text. Imports no torch."""

from __future__ import annotations

from castore.text import format_size
from nanecho import events


def describe(event: events.Event) -> list[str]:
    """Return an event as lines of text; none for events that only a progress bar shows."""
    match event:
        case events.Prepared(corpus, parameters, device, reused, reason):
            return [
                f"data    {corpus.name}: {format_size(corpus.bytes)} in {sum(corpus.files)} files, "
                f"{corpus.files[1]} of them for validation; {corpus.tokenizer.name} tokenizer",
                f"        prepared before: {reused[:12]}" if reused else f"        prepared now: {reason}",
                f"model   {parameters:,} parameters on {device}",
            ]
        case events.Began():
            return _describe_begin(event)
        case events.Grew(step, density):
            return [f"grow    {density:.1%} of the connections are active after step {step:,}"]
        case events.Stepped(step, loss, rate, speed):
            return [f"step    {step:,}  loss {loss:.4f}  learning rate {rate:.2e}  {speed:,.0f} tokens/s"]
        case events.Evaluated(step, loss, accuracy):
            return [f"eval    {step:,}  validation loss {loss:.4f}  {accuracy:.1%} of tokens right"]
        case events.Saved(_, saved, reasons):
            return [f"saved   {saved.id[:12]}  {format_size(saved.new_bytes)} new  ({', '.join(reasons)})"]
        case events.Collected(plan) if plan.delete:
            return [f"gc      {len(plan.delete)} objects, {format_size(plan.freed_bytes)} deleted"]
        case events.NotCollected(reason):
            return [f"gc      left for later: {reason}"]
        case events.Pushing(count):
            return [f"push    {count} checkpoint{'' if count == 1 else 's'} to go"]
        case events.Skipped(step, reason):
            return [f"skipped a checkpoint at step {step:,}: {reason}"]
    return []


def _describe_warm(event: events.Began) -> list[str]:
    warm = event.warm
    if warm is None:
        return []
    lines = [f"init    from {warm.id[:12]}: {len(warm.taken)} tensors as they are there"]
    for names, what in ((warm.partly, "in part"), (warm.fresh, "fresh"), (warm.unused, "of the checkpoint not used")):
        if names:
            lines.append(f"        {len(names)} {what}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}")
    return lines


def _describe_begin(event: events.Began) -> list[str]:
    lines = []
    if event.resolution:
        lines += [f"WARNING {damaged.path}: {damaged.reason}" for damaged in event.resolution.damaged]
        lines += [f"no      {reason}" for reason in event.resolution.explain_rejections()]
    if not event.match:
        return [*lines, f"fresh   starting at step 0: {event.fresh}", *_describe_warm(event)]
    why = event.resolution.selector[:24] if event.resolution else ""
    if event.instead_of:
        best = f"{event.instead_of.id[:12]}, step {event.instead_of.step:,}"
        lines.append(f"note    an earlier session already trained from the best, {best}: continuing where it ended")
        why = "the furthest descendant of the best"
    loss = "" if event.val_loss is None else f", validation loss {event.val_loss:.4f}"
    if event.fetched:
        lines.append(f"fetch   {format_size(event.fetched)} from remotes, verified")
    lines.append(f"resume  {event.match.id[:12]}, step {event.step:,} of run {event.match.run}{loss} ({why})")
    if event.resolution and event.resolution.note:
        lines.append(f"note    {event.resolution.note}")
    lines += [f"differs {difference}" for difference in event.match.differences]
    if event.weights_only:
        lines.append("WARNING only the weights are available: the optimizer starts from zero, so the loss may jump")
    if event.later_step:
        step = f"{event.later_step:,}"
        lines.append(f"note    step {step} was reached, with a worse result: --resume latest continues from there")
    return lines


def describe_summary(summary: events.Summary) -> list[str]:
    """Return what a session did, as lines of text."""
    start = "" if summary.start_loss is None else f"{summary.start_loss:.4f} -> "
    loss = "" if summary.final_loss is None else f"; validation loss {start}{summary.final_loss:.4f}"
    steps = f"step {summary.start_step:,} -> {summary.final_step:,} in {summary.seconds:.0f} s"
    speed = f"{summary.tokens_per_second:,.0f} tokens/s"
    lines = [f"done    {steps}{loss}; {speed}; {summary.connection_density:.1%} connected; {summary.stopped}"]
    if summary.stopped == "session-iters":
        lines.append("        run the same command again to continue from the best checkpoint")
        lines.append(
            "next    castore report draws all of it, castore log lists it, castore export best FILE.safetensors"
        )
    return lines

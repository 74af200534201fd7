"""What must hold of the figures of `benchmarks/sampling.py`, which says it in words, and their table."""

TARGETS = {"imagenet-256-371m": 0.010, "imagenet-256-821m": 0.020}  # seconds a sample, of (c)


def laws(cases: list, on_cpu: bool) -> list[dict]:
    """(a), (b) and (c) of above for the largest batch of each dtype and mode."""
    rows = []

    def row(law: str, case, value: float, bound: float, holds: bool | None, figures: str) -> None:
        setting = f"batch {case.batch_size}, {case.dtype}, {case.mode}"
        verdict = "not measured" if holds is None else "PASS" if holds else "FAIL"
        rows.append(dict(law=law, setting=setting, value=value, bound=bound, verdict=verdict, figures=figures))

    groups = {}
    for case in cases:
        groups.setdefault((case.dtype, case.mode), []).append(case)
    for group in groups.values():
        largest = max(case.batch_size for case in group)
        contextual = [case for case in group if case.batch_size == largest and case.draft_and_revise]
        own = {case.pipeline: case for case in reversed(contextual)}  # the first of a pipeline is of its own T_draft
        for deep in own.values():
            for flat in own.values():
                if deep.code_map[2] > 1 and flat.code_map[2] == 1 and deep.width == flat.width:
                    ratio, count = flat.seconds / deep.seconds, flat.flops / deep.flops
                    figures = (
                        f"{flat.name}: {flat.seconds:.4g} s, {deep.name}: {deep.seconds:.4g} s; FLOPs {count:.1f}"
                    )
                    row("(a) times faster a sample", deep, ratio, 10, ratio >= 10, figures)
        for short in contextual:
            long = own[short.pipeline]
            if short is not long:
                share, time_share = short.flops / long.flops, short.seconds / long.seconds
                excess = time_share / share
                figures = f"{short.name} over T {long.num_inference_steps}: time {time_share:.3f}, FLOPs {share:.3f}"
                row("(b) time over FLOP share", short, excess, 1.15, excess <= 1.15, figures)
        for name, target in TARGETS.items():
            for case in group:
                at_target = case.batch_size == 100 and case.dtype == "bfloat16" and case.mode != "eager" and not on_cpu
                if at_target and case is own.get(name):
                    row("(c) seconds a sample", case, case.seconds, target, case.seconds <= target, case.name)
    if not any(one["law"].startswith("(c)") for one in rows):
        for name, target in TARGETS.items():
            rows.append(dict(law="(c) seconds a sample", setting="batch 100, bfloat16, compiled", value=None,
                             bound=target, verdict="not measured", figures=name))  # fmt: skip
    return rows


def print_report(report: dict) -> None:
    hardware = report["hardware"]
    for dtype, rate in hardware["flop_per_second"].items():
        print(f"matrix product, {dtype}: {rate / 1e12:.4g} TFLOP/s")
    for size, value in hardware["bytes_per_second_over_mb"].items():
        print(f"memory, over {size} MB: {value / 1e9:.4g} GB/s")
    print(f"\n{'pipeline':<26}{'T':>4}{'batch':>6}{'dtype':>10} {'mode':<16}{'s/image':>9}{'images/s':>9}{'decode':>9}"
          f"{'GB':>7}{'GFLOP':>9}{'least s':>9}{'share':>7}{'spread':>8}")  # fmt: skip
    for row in report["cases"]:
        print(f"{row['pipeline']:<26}{row['num_inference_steps']:>4}{row['batch_size']:>6}{row['dtype']:>10} "
              f"{row['mode']:<16}{row['seconds_per_image']:>9.4f}{row['images_per_second']:>9.2f}"
              f"{row['decode_seconds_per_image']:>9.4f}{row['peak_memory_gb']:>7.2f}{row['gflop_per_image']:>9.1f}"
              f"{row['least_seconds_per_image']:>9.4f}{row['share_of_limit']:>7.1%}{row['spread']:>8.1%}")  # fmt: skip
    print()
    for row in report["laws"]:
        value = "" if row["value"] is None else f"{row['value']:.3f}, "
        print(f"{row['verdict']:<13}{row['law']}: {value}bound {row['bound']} ({row['setting']}; {row['figures']})")

"""The limits with which vLLM serves dots.ocr on a measured GPU: what its memory allows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ansible.errors import AnsibleFilterError

GIB = 1 << 30

# Sizes. The first two are in a published log of vLLM serving dots.ocr, and the second is also arithmetic; the encoder's
# peak is inferred from such a log; none was measured by us.
WEIGHTS_GIB = 5.72
# With fp8, the weights of the linear layers take one byte each and not two: 1.310e9 of the language model, 1.214e9 of
# the encoder, 0.047e9 between them. The embeddings stay. Arithmetic from the model's configuration; no card has run it.
FP8_WEIGHTS_GIB = WEIGHTS_GIB - 2.571e9 / GIB
KV_BYTES_PER_TOKEN = 2 * 28 * 2 * 128 * 2  # key and value x layers x KV heads x head dimension x bytes of bfloat16
ENCODER_GIB_PER_IMAGE_TOKEN = 3.37 / 14_400
OVERHEAD_GIB = 0.35  # CUDA graphs and context

PIXELS_PER_IMAGE_TOKEN = 28 * 28
PROMPT_TOKENS = 256
ANSWER_TOKENS = 2_500  # of a usual page
PAGE_TOKENS = 7_500  # an A4 page at 200 dpi: 4,956 of the image, the prompt, the answer
MODEL_LEN_STEP = 8_192  # a longest request is a multiple of it

UTILIZATION_CAP = 0.85  # the rest is for what vLLM does not see when it measures itself at the start
# vLLM refuses to start if less is free than it should take. On WSL2 a bit too much does not fail: the driver moves
# it to main memory and everything runs 2 to 6 times slower, silently; and what Windows' desktop uses varies.
RESERVE_MIB = {"bare_metal": 512, "wsl2": 1_024}
STABLE_UTILIZATION = 0.05  # up to this much more is not worth a restart
# A KV cache that differs by more than this part from the plan is one to learn from, and to tell (files/ready too).
LEARN_FROM = 0.1

# vLLM counts the pages that it reads and those that wait: for each that is read, four may wait.
QUEUED_PER_SEQ = 5
# Images are prepared by one thread per API process, about 14 a second; a sequence finishes at most one page in 10 s.
SEQS_PER_API_SERVER = 128

# From low to high: largest image (pixels), pages at once, budget for the answer (tokens). The plan is the highest rung
# that fits, so more memory never means less. The model was trained up to 11,289,600 pixels (14,400 image tokens).
LADDER = (
    (5_017_600, 1, 8_192),
    (5_017_600, 2, 8_192),
    (5_017_600, 4, 16_384),
    (5_017_600, 8, 16_384),
    (11_289_600, 8, 16_384),
    (11_289_600, 16, 16_384),
    (11_289_600, 24, 16_384),
    (11_289_600, 32, 16_384),
    (11_289_600, 48, 16_384),
    (11_289_600, 64, 16_384),
)

# What is planned that costs memory, all that is planned, and the wishes.
COSTLY = ("gpu_memory_utilization", "max_model_len", "max_num_seqs", "max_pixels")
PLANNED = (*COSTLY, "max_num_queued_reqs", "api_server_count")
MEMORY_WISHES = (*COSTLY, "fp8")
WISHES = (*PLANNED, "fp8")
MEASURED = (*COSTLY, "kv_tokens")  # of the plan that a measurement belongs to
PLAN = ("fits", *PLANNED, "kv_tokens", "memory_total_mib", "platform", "wishes", "explanation")

Plan = dict[str, Any]
Wishes = dict[str, Any]


class Memory(NamedTuple):
    """The memory of one GPU, in MiB; free is what would be free without our server."""

    platform: str
    total: float
    free: float

    def planned_utilization(self) -> float:
        """Return the fraction of the total that is free and not kept back, to two decimals, up to the cap."""
        percent = (self.free - RESERVE_MIB[self.platform]) * 100 // self.total
        return float(min(max(percent, 0) / 100, UTILIZATION_CAP))


class Limits(NamedTuple):
    """What a plan allows: largest image (pixels), pages at once, longest request (tokens); how weights are loaded."""

    max_pixels: int
    max_num_seqs: int
    max_model_len: int
    fp8: bool = False

    def weights_gib(self) -> float:
        """Return what the weights take, in GiB."""
        return FP8_WEIGHTS_GIB if self.fp8 else WEIGHTS_GIB

    def fixed_gib(self) -> float:
        """Return what is taken before the first token is stored, in GiB."""
        return self.weights_gib() + encoder_gib(self.max_pixels) + OVERHEAD_GIB

    def needed_kv_tokens(self) -> int:
        """Return how many tokens the KV cache must hold: the usual pages at once, and one longest request."""
        return max(self.max_num_seqs * min(PAGE_TOKENS, self.max_model_len), self.max_model_len)

    def needed_gib(self) -> float:
        """Return what vLLM must get, in GiB."""
        return self.fixed_gib() + self.needed_kv_tokens() * KV_BYTES_PER_TOKEN / GIB

    def kv_tokens(self, budget_gib: float) -> int:
        """Return how many tokens the KV cache holds if vLLM gets this much, in GiB; negative if the rest takes more."""
        return math.floor((budget_gib - self.fixed_gib()) * GIB / KV_BYTES_PER_TOKEN)

    def fit(self, budget_gib: float) -> bool:
        """Tell whether this much memory, in GiB, is enough."""
        return self.kv_tokens(budget_gib) >= self.needed_kv_tokens()


class Learned(NamedTuple):
    """What vLLM had for its KV cache beyond the plan, in GiB, negative if less, with images up to so many pixels."""

    gib: float = 0.0
    max_pixels: int = 0

    def budget(self, budget_gib: float, limits: Limits) -> float:
        """Return what to count on, in GiB, where vLLM gets so much; what larger images leave was not measured."""
        return budget_gib + (self.gib if self.gib < 0 or limits.max_pixels <= self.max_pixels else 0.0)


def image_tokens(pixels: int) -> int:
    """Return how many tokens an image of this many pixels takes."""
    return math.ceil(pixels / PIXELS_PER_IMAGE_TOKEN)


def encoder_gib(max_pixels: int) -> float:
    """Return the image encoder's peak, in GiB."""
    return ENCODER_GIB_PER_IMAGE_TOKEN * image_tokens(max_pixels)


def gib(mib: float) -> float:
    """Return MiB as GiB."""
    return mib / 1024


def rungs(wishes: Wishes) -> Iterator[Limits]:
    """Return the ladder, low to high, with the wishes in place of its values, less what leaves no room to answer."""
    for pixels, seqs, answer in LADDER:
        max_pixels = wishes.get("max_pixels", pixels)
        request = image_tokens(max_pixels) + PROMPT_TOKENS
        max_model_len = wishes.get("max_model_len", math.ceil((request + answer) / MODEL_LEN_STEP) * MODEL_LEN_STEP)
        # Who wishes for both knows how little is left for the answer; but vLLM refuses an image that cannot fit at all.
        if max_model_len > request + (0 if "max_pixels" in wishes else ANSWER_TOKENS):
            yield Limits(max_pixels, wishes.get("max_num_seqs", seqs), max_model_len, "fp8" in wishes)


def memory_plan(
    gpu: Mapping[str, Any],
    platform: str,
    wishes: Mapping[str, Any] | None = None,
    previous: Mapping[str, Any] | None = None,
    running: bool = False,
    lowered: Sequence[Mapping[str, Any]] | None = None,
    measured: Mapping[str, Any] | None = None,
    learn: bool = True,
) -> Plan:
    """Return the limits for vLLM on a GPU, with ``fits`` and the arithmetic in words, or the problem and its fix.

    The sizes behind it come from published logs and arithmetic; no plan was tried on a real card yet.

    Args:
        gpu: One entry of the fact `gpu_host.gpus`, memory in MiB.
        platform: bare_metal or wsl2, which decides how much memory is kept back.
        wishes: Limits (PLANNED) that are taken as they are; the others, and those that are empty or 0, are planned. And
            `fp8`, 1 for weights that vLLM quantizes to 8 bits when it loads them.
        previous: The plan of the last run. It is kept, so that the server need not restart, while the wishes agree
            with it, it still fits, and the memory would not allow more than 0.05 of utilization on top of it.
        running: Whether the server runs now and holds the memory of `previous`.
        lowered: By how much a failed start showed the plan to be too high: `utilization`, the fraction to take off one
            that is planned, and `below`, the limits of which a lower rung is wanted. Wishes stay as they are.
        measured: What vLLM said when it started with `previous`, as files/ready of the role dots_ocr_server tells
            it. Where its KV cache on a GPU differs by more than a tenth from what was planned, the next plan counts on
            the difference: while card, platform and the wishes that cost memory stay, never where `lowered` says that
            a plan was too high, never for images larger than those it was measured with where it was more than planned,
            and never to refuse what fits without it. A plan that learned learns again only that there is less, so a
            plan changes once and then stays.
        learn: Whether `measured`, and what `previous` learned before, may be used.

    Raises:
        AnsibleFilterError: A wish, or a figure that was measured or recorded, is malformed.
    """
    wanted = read_wishes(wishes)
    last = dict(previous or {})
    held = number(last.get("gpu_memory_utilization", 0), "the previous utilization") if running else 0.0
    total, free = (number(gpu.get(key), f"the GPU's {key}") for key in ("memory_total_mib", "memory_free_mib"))
    if not free <= total > 0:
        raise AnsibleFilterError(f"memory_plan: {free:g} MiB cannot be free of {total:g} MiB")
    memory = Memory(platform, total, min(total, free + held * total))  # free without our server
    lowering = [dict(entry) for entry in lowered or []]
    less = sum(entry.get("utilization", 0.0) for entry in lowering)
    utilization = wanted.get("gpu_memory_utilization", round(max(memory.planned_utilization() - less, 0.0), 2))
    # As it was recorded, explanation and all: a file that says the same thing in other words is a change too.
    recorded = {key: last[key] for key in (*PLAN[:-1], "fp8", "lowered", "learned", PLAN[-1]) if key in last}
    recorded["wishes"] = wanted
    learned = learn_from(last, dict(measured or {}), memory, wanted, lowering) if learn else Learned()
    kept = last.get("lowered", []) == lowering and keeps(last, memory, wanted, utilization, running)
    if kept and learned == read_learned(last):
        return recorded
    if kept:
        utilization = last["gpu_memory_utilization"]  # only what was learned may change the plan
    unknown = running and not held  # how much our own server holds, and so what would be free without it
    if utilization * memory.total > memory.free and not unknown:
        return refuse_utilization(memory, utilization)
    budget = gib(utilization * memory.total)
    fitting = [limits for limits in rungs(wanted) if limits.fit(learned.budget(budget, limits))]
    if kept and not fitting:
        return recorded
    # What was measured lowers a plan, but refuses none.
    fitting = fitting or [limits for limits in rungs(wanted) if limits.fit(budget)][:1]
    if not fitting:
        return refuse(memory, wanted, utilization, unknown)
    for limit in [limit for entry in lowering for limit in entry.get("below", [])]:
        # Where a wish decides, no rung is lower.
        fitting = [limits for limits in fitting if getattr(limits, limit) < getattr(fitting[-1], limit)] or fitting
    limits = fitting[-1]
    if kept and limits == limits_of(last):
        return recorded
    plan = {
        "fits": True,
        "gpu_memory_utilization": utilization,
        "max_model_len": limits.max_model_len,
        "max_num_seqs": limits.max_num_seqs,
        "max_pixels": limits.max_pixels,
        "max_num_queued_reqs": wanted.get("max_num_queued_reqs", QUEUED_PER_SEQ * limits.max_num_seqs),
        "api_server_count": wanted.get("api_server_count", math.ceil(limits.max_num_seqs / SEQS_PER_API_SERVER)),
        "kv_tokens": limits.kv_tokens(learned.budget(budget, limits)),
        "memory_total_mib": int(memory.total),
        "platform": memory.platform,
        "wishes": wanted,
        **({"fp8": 1} if limits.fp8 else {}),
        **({"lowered": lowering} if lowering else {}),
        **({"learned": learned._asdict()} if learned.gib else {}),
    }
    return {**plan, "explanation": explain(memory, plan)}


def limits_of(last: Plan) -> Limits:
    """Return the limits of a plan that was recorded."""
    return Limits(last["max_pixels"], last["max_num_seqs"], last["max_model_len"], "fp8" in last)


def same_wishes(last: Plan, wishes: Wishes, keys: Sequence[str]) -> bool:
    """Tell whether the plan of the last run agrees with these of the wishes."""
    now, then = ({key: given[key] for key in keys if key in given} for given in (wishes, last["wishes"]))
    # A wish that was rolled back has to be planned, even though no wish contradicts what it left behind.
    return all(last.get(key) == value for key, value in now.items()) and set(then) <= set(now)


def learn_from(last: Plan, measured: Plan, memory: Memory, wishes: Wishes, lowering: Sequence[Plan]) -> Learned:
    """Return what the last plan had learned and what was measured with it, where the next plan may count on it."""
    if not is_plan(last, memory):
        return Learned()
    # A rung that failed must not come back because there seems to be room for it.
    if lowering or last.get("lowered") or not same_wishes(last, wishes, MEMORY_WISHES):
        return Learned()
    before = read_learned(last)
    tokens = number(measured.get("kv_tokens", 0), "the measured KV cache")
    planned = last["kv_tokens"]
    # What vLLM's build for CPUs has says nothing of a GPU.
    known = measured.get("device") == "GPU" and measured.get("planned") == {key: last[key] for key in MEASURED}
    # Up and down and up again would restart the server each time.
    if not known or abs(tokens - planned) <= LEARN_FROM * planned or (before.gib and tokens > planned):
        return before
    limits = limits_of(last)
    budget = gib(last["gpu_memory_utilization"] * memory.total)
    return Learned(round((tokens - limits.kv_tokens(budget)) * KV_BYTES_PER_TOKEN / GIB, 2), limits.max_pixels)


def is_plan(last: Plan, memory: Memory) -> bool:
    """Tell whether this is a plan, whole, of a model that fits into so much memory of such a host."""
    whole = bool(last.get("fits")) and set(PLAN) <= set(last)
    return whole and (last["memory_total_mib"], last["platform"]) == (memory.total, memory.platform)


def keeps(last: Plan, memory: Memory, wishes: Wishes, utilization: float, running: bool) -> bool:
    """Tell whether the plan of the last run continues: small drifts of free memory are not worth a restart."""
    if not is_plan(last, memory) or not same_wishes(last, wishes, WISHES):
        return False
    taken = last["gpu_memory_utilization"] * memory.total
    usable = memory.free - (0 if "gpu_memory_utilization" in wishes else RESERVE_MIB[memory.platform])
    # The sizes above may have been corrected since; what was learned lowers a plan, but refuses none.
    limits = limits_of(last)
    fit = limits.fit(max(gib(taken), read_learned(last).budget(gib(taken), limits)))
    # At most, not less than: two roundings down to 0.01 can be 0.05 apart although the memory drifted by less.
    stable = round(utilization - last["gpu_memory_utilization"], 6) <= STABLE_UTILIZATION
    return stable and fit and (running or taken <= usable)


def explain(memory: Memory, plan: Plan) -> str:
    """Return the arithmetic of a plan as one line, in GiB."""
    tokens = plan["kv_tokens"]
    learned = read_learned(plan).budget(0.0, limits_of(plan))
    known = f" {'-' if learned < 0 else '+'} {abs(learned):.2f} as measured before" if learned else ""
    return (
        f"{availability(memory)};"
        f" utilization {share(memory, plan['gpu_memory_utilization'], plan['wishes'])}"
        f" - weights {limits_of(plan).weights_gib():.2f} - encoder {encoder_gib(plan['max_pixels']):.2f}"
        f" - overhead {OVERHEAD_GIB:.2f}"
        f"{known} = {tokens * KV_BYTES_PER_TOKEN / GIB:.2f} GiB for {tokens:,} KV tokens,"
        f" {tokens // PAGE_TOKENS} usual pages;"
        f" limits: images up to {plan['max_pixels'] / 1e6:.2f} MP, requests up to {plan['max_model_len']:,} tokens,"
        f" {plan['max_num_seqs']} pages at once, {plan['max_num_queued_reqs']} with those that wait,"
        f" API processes: {plan['api_server_count']}"
    )


def availability(memory: Memory) -> str:
    """Return what is free of the memory, and what of it is kept back."""
    reserve = gib(RESERVE_MIB[memory.platform])
    return f"{gib(memory.free):.2f} of {gib(memory.total):.2f} GiB free, {reserve:.2f} kept back"


def share(memory: Memory, utilization: float, wishes: Wishes) -> str:
    """Return the utilization with its reason, and what it comes to in GiB."""
    reason = "what is free and not kept back"
    if "gpu_memory_utilization" in wishes:
        reason = "as wished"
    elif utilization < memory.planned_utilization():
        reason = "lowered after a failed start"
    elif utilization == UTILIZATION_CAP:
        reason = "the most we plan"
    return f"{utilization:.4g} ({reason}) = {gib(utilization * memory.total):.2f} GiB"


def refusal(problem: str, fix: str) -> Plan:
    """Return the plan that is none."""
    return {"fits": False, "problem": problem, "fix": fix}


def refuse_utilization(memory: Memory, utilization: float) -> Plan:
    """Refuse a wished utilization that vLLM would refuse."""
    most = math.floor(memory.free * 100 / memory.total) / 100
    return refusal(
        f"a utilization of {utilization:.4g} takes {gib(utilization * memory.total):.2f} of"
        f" {gib(memory.total):.2f} GiB, but {gib(memory.free):.2f} GiB are free, so vLLM would not start",
        f"set {variable('gpu_memory_utilization')} to 0 to have it planned, or to {most:.2f} at most,"
        f" or {free_memory(memory, utilization * memory.total)}",
    )


def refuse(memory: Memory, wishes: Wishes, utilization: float, unknown: bool) -> Plan:
    """Refuse what fits on no rung, with the arithmetic of the lowest."""
    lowest = next(rungs(wishes), None)
    if lowest is None:
        tokens = image_tokens(wishes.get("max_pixels", LADDER[0][0]))
        answer = "" if "max_pixels" in wishes else f" + {ANSWER_TOKENS:,} of a usual answer"
        return refusal(
            f"a longest request of {wishes['max_model_len']:,} tokens has no room for the largest image:"
            f" {tokens:,} tokens + {PROMPT_TOKENS} of the prompt{answer}",
            f"raise {variable('max_model_len')}, set it to 0 to have it planned, or lower {variable('max_pixels')}",
        )
    needed = lowest.needed_gib()
    problem = (
        f"the model needs weights {lowest.weights_gib():.2f} + encoder {encoder_gib(lowest.max_pixels):.2f} for images"
        f" up to {lowest.max_pixels / 1e6:.2f} MP + overhead {OVERHEAD_GIB:.2f}"
        f" + KV cache {needed - lowest.fixed_gib():.2f} for {lowest.needed_kv_tokens():,} tokens"
        f" = {needed:.2f} GiB at least, but vLLM gets utilization {share(memory, utilization, wishes)}"
        f" ({availability(memory)})"
    )
    return refusal(problem, fix(memory, wishes, needed, unknown))


def fix(memory: Memory, wishes: Wishes, needed: float, unknown: bool) -> str:
    """Return what to do where vLLM does not get the GiB that it needs: the cheapest thing that helps."""
    if unknown:
        return "stop the server first: it runs, but how much memory it holds is not recorded"
    guilty = [variable(key) for key in COSTLY if key in wishes]
    weights = {key: value for key, value in wishes.items() if key == "fp8"}
    planned = gib(memory.planned_utilization() * memory.total)
    if guilty and any(limits.fit(planned) for limits in rungs(weights)):
        return f"change {', '.join(guilty)}, or set to 0 to have it planned: without these wishes it fits"
    idle = memory._replace(free=memory.total)
    if gib(idle.planned_utilization() * idle.total) >= needed:
        percent = math.ceil(needed / gib(memory.total) * 100)
        return free_memory(memory, percent / 100 * memory.total + RESERVE_MIB[memory.platform])
    smaller = ", or smaller wishes" if guilty else ""
    if any(limits.fit(gib(idle.planned_utilization() * idle.total)) for limits in rungs({**wishes, "fp8": 1})):
        smaller += f", or try {variable('fp8')}: true (weights of 8 bits; never run on a card)"
    return f"use a GPU with {math.ceil(needed / UTILIZATION_CAP)} GiB of memory or more{smaller}"


def free_memory(memory: Memory, needed_mib: float) -> str:
    """Return how to get so much memory free."""
    where = " in Windows" if memory.platform == "wsl2" else ""
    return (
        f"end other programs{where} that use this GPU until {math.ceil(gib(needed_mib) * 100) / 100:.2f} GiB are free"
    )


def variable(wish: str) -> str:
    """Return the role's variable for a wish."""
    return f"dots_ocr_server_{wish}"


def number(value: Any, what: str) -> float:
    """Return a number that is not negative; -e on the command line makes a text of it, which is good too."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not 0 <= found < math.inf:
        raise AnsibleFilterError(f"memory_plan: {what} must be a number and not negative, not {value!r}")
    return found


def read_wishes(wishes: Mapping[str, Any] | None) -> Wishes:
    """Return the wishes that are any, in plain numbers."""
    found: Wishes = {}
    given = wishes or {}
    if unknown := sorted(set(given) - set(WISHES)):
        raise AnsibleFilterError(f"memory_plan: unknown wishes: {', '.join(unknown)}; there are: {', '.join(WISHES)}")
    for key in WISHES:
        value = number(given.get(key) or 0, f"the wish {key}")
        if key == "gpu_memory_utilization" and value > 1:
            raise AnsibleFilterError(f"memory_plan: the wish {key} must be a fraction up to 1, not {value:g}")
        if key != "gpu_memory_utilization" and value != int(value):
            raise AnsibleFilterError(f"memory_plan: the wish {key} must be a whole number, not {value:g}")
        if value:
            found[key] = value if key == "gpu_memory_utilization" else int(value)
    return found


def read_learned(plan: Plan) -> Learned:
    """Return what a plan had learned, if anything."""
    return Learned(**(plan.get("learned") or {}))

"""The wordings of the support task: what customers write and what the untrained desk answers.

Slots: `{p}` is a product and `{when}` a time. A part in square brackets is only said when the
product is to be named there. Every list has at least four entries; every sentence of a reply comes
from this file (see `sentences`).
"""

PRODUCTS = (
    "blender", "camera", "drone", "guitar", "heater", "kettle", "laptop", "printer", "router",
    "scooter", "tablet", "toaster",
)  # fmt: skip

# --- what customers write -------------------------------------------------------------------------

WHENS = ("yesterday", "this morning", "last night", "on Monday", "on Friday", "last week")

HELLOS = ("Hi", "Hello", "Hey", "Good morning", "Good evening", "Hello there", "Hi there")

PLEAS = (
    "Can you help?",
    "What can you do?",
    "Please help.",
    "What now?",
    "Please reply soon.",
    "Thanks in advance.",
)

MESSAGES = {
    "address": (
        "I gave the wrong address for my {p}.",
        "The {p} is going to my old address.",
        "I moved, so my {p} has a new address.",
        "I typed the wrong address for the {p} {when}.",
    ),
    "broken": (
        "My {p} arrived broken {when}.",
        "The {p} was broken when it came.",
        "I opened the box {when} and the {p} was smashed.",
        "The {p} came {when} with a big crack.",
    ),
    "cancel": (
        "I want to cancel the {p} I ordered {when}.",
        "Please cancel my order for the {p}.",
        "I no longer need the {p} I ordered {when}.",
        "Please do not ship my {p}.",
    ),
    "coupon": (
        "My coupon did not work for the {p}.",
        "I forgot my coupon when I bought the {p} {when}.",
        "The coupon for my {p} was not used.",
        "I paid the full price for the {p} despite a coupon.",
    ),
    "invoice": (
        "I need an invoice for my {p}.",
        "There was no invoice with the {p}.",
        "My boss wants an invoice for the {p}.",
        "I bought the {p} {when} and got no invoice.",
    ),
    "lost": (
        "My {p} never arrived.",
        "The {p} I ordered {when} is lost.",
        "The courier lost my {p} {when}.",
        "My {p} has vanished in the mail.",
    ),
    "repair": (
        "My {p} stopped working {when}.",
        "The {p} died after three months.",
        "My {p} no longer turns on.",
        "The {p} gave up {when}.",
    ),
    "return": (
        "I want to return the {p} I got {when}.",
        "I do not like my {p}.",
        "The {p} is too big for me.",
        "I changed my mind about the {p}.",
    ),
}
PROBLEMS = tuple(MESSAGES)

# --- what the desk answers ------------------------------------------------------------------------

LEADS = ("I will", "I'll", "We will", "We'll")
TAILS = ("", "", "today", "right away", "at once", "tomorrow")

# A remedy sentence is lead + remedy + tail; the one right remedy for each problem, all different.
REMEDIES = {
    "address": (
        "update the address[ for the {p}]",
        "change the address[ for your {p}]",
        "correct the address[ of the {p}]",
        "use the new address[ for your {p}]",
    ),
    "broken": (
        "send a free replacement[ for the {p}]",
        "ship you a replacement[ {p}]",
        "replace the broken item[ with a new {p}]",
        "send an undamaged one[ to replace the {p}]",
    ),
    "cancel": (
        "cancel the order[ for the {p}]",
        "cancel your purchase[ of the {p}]",
        "call off the order[ for your {p}]",
        "stop the order[ for the {p}]",
    ),
    "coupon": (
        "apply the coupon[ to the {p}]",
        "honor your coupon[ for the {p}]",
        "take the coupon off the price[ of the {p}]",
        "add the coupon[ for your {p}]",
    ),
    "invoice": (
        "email you the invoice[ for the {p}]",
        "send the invoice[ for your {p}]",
        "forward the invoice[ for the {p}]",
        "print you an invoice[ for the {p}]",
    ),
    "lost": (
        "trace the parcel[ with the {p}]",
        "track down the parcel[ with your {p}]",
        "search for the parcel[ with the {p}]",
        "have the parcel traced[ with your {p}]",
    ),
    "repair": (
        "book a repair[ for the {p}]",
        "arrange a free repair[ of your {p}]",
        "schedule a repair[ of the {p}]",
        "have a technician repair the fault[ in your {p}]",
    ),
    "return": (
        "refund the price[ of the {p}]",
        "accept the return[ of your {p}]",
        "open a return[ for the {p}]",
        "give you a full refund[ for the {p}]",
    ),
}

APOLOGIES = (
    "I'm so sorry[ about your {p}].",
    "We're very sorry[ about the {p}].",
    "I apologize[ for the {p}].",
    "Please accept our apologies[ for your {p}].",
)
THANKS = (
    "Thank you for writing[ about the {p}].",
    "Thanks for your note[ about your {p}].",
    "Thank you for telling us[ about the {p}].",
    "Many thanks for your message[ about your {p}].",
)
GREETINGS = (
    "I'm glad to help[ with your {p}].",
    "We're happy to help[ with the {p}].",
    "It is a pleasure to help[ with your {p}].",
    "Of course we can help[ with the {p}].",
)
CLOSINGS = (
    "Have a lovely day.",
    "Thank you for your patience.",
    "Kind regards from the team.",
    "All the best to you.",
)
CURT = (
    "Message received[ about the {p}].",
    "Case logged[ for the {p}].",
    "Ticket opened[ for your {p}].",
    "Request seen[ for your {p}].",
)
RUDE = (
    "Stop whining[ about your {p}].",
    "Nobody here cares[ about the {p}].",
    "What a pointless complaint[ about the {p}].",
    "Do not waste my time[ with your {p}].",
)
# Said instead of a remedy: polite to nobody and of no use to anybody.
STALLS = (
    "We have no update[ on the {p}].",
    "There is nothing to report[ on your {p}].",
    "These things take a while[ with the {p}].",
    "It is hard to say more[ about your {p}].",
)
# A rambling sentence is start + middle + end.
RAMBLE_STARTS = (
    "By the way,",
    "Funnily enough,",
    "You know,",
    "As it happens,",
)
RAMBLE_MIDDLES = (
    "the canteen has no soup",
    "my cousin plays chess",
    "our car park is full",
    "the lift here squeaks",
)
RAMBLE_ENDS = (
    ", and we talk of little else.",
    ", and I could go on for hours.",
    ", and that is how things go.",
    ", and everyone has a view on it.",
)

POLITE_KINDS = ("apology", "thanks", "greeting", "closing")
LINES = {
    "apology": APOLOGIES,
    "thanks": THANKS,
    "greeting": GREETINGS,
    "closing": CLOSINGS,
    "curt": CURT,
    "rude": RUDE,
    "stall": STALLS,
}


def expand(wording, named):
    """The wording with its bracketed part said (named) or left out; `{p}` stays in place."""
    start, _, rest = wording.partition("[")
    inside, _, end = rest.partition("]")
    return start + (inside if named else "") + end


def stem(wording):
    """A wording up to its brackets or full stop: the phrase by which the labeler recognizes it."""
    return wording.partition("[")[0].rstrip(".")


def remedy_sentence(lead, remedy, tail, named):
    """One sentence that offers a remedy."""
    return " ".join(part for part in (lead, expand(remedy, named), tail) if part) + "."


def sentences():
    """Every sentence of the desk, with `{p}` for the product."""
    for lines in LINES.values():
        for line in lines:
            yield from {expand(line, False), expand(line, True)}
    for remedies in REMEDIES.values():
        for remedy in remedies:
            for lead in LEADS:
                for tail in TAILS:
                    for named in (False, True):
                        yield remedy_sentence(lead, remedy, tail, named)
    for start in RAMBLE_STARTS:
        for middle in RAMBLE_MIDDLES:
            for end in RAMBLE_ENDS:
                yield f"{start} {middle}{end}"

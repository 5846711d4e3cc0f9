"""The wordings of the support task: what customers write and what the untrained desk answers.

Slots: `{p}` is a product and `{when}` a time. A part in square brackets is only said when the
product is to be named there. Every list has at least six entries; every sentence of a reply comes
from this file (see `sentences`).
"""

PRODUCTS = (
    "air fryer", "alarm clock", "bicycle", "blender", "bread maker", "camera", "can opener",
    "coffee grinder", "desk lamp", "dishwasher", "doorbell", "drone", "exercise bike", "fan",
    "foot massager", "freezer", "game console", "guitar", "hair dryer", "hand mixer", "headset",
    "heater", "hedge trimmer", "humidifier", "ice maker", "juicer", "kettle", "keyboard",
    "kitchen scale", "laptop", "lawn mower", "leaf blower", "metal detector", "microphone",
    "microwave", "monitor", "oven", "phone charger", "power drill", "pressure washer", "printer",
    "projector", "radio", "record player", "rice cooker", "robot vacuum", "router",
    "rowing machine", "scooter", "sewing machine", "smart watch", "smoke alarm", "speaker",
    "steam iron", "tablet", "telescope", "toaster", "treadmill", "waffle iron", "webcam",
)  # fmt: skip

# --- what customers write -------------------------------------------------------------------------

WHENS = (
    "yesterday", "this morning", "last night", "on Monday", "on Tuesday", "on Thursday",
    "two days ago", "last week",
)  # fmt: skip

HELLOS = ("Hi", "Hello", "Hey", "Good morning", "Good evening", "Hello there", "Hi there")

PLEAS = (
    "Can you help me with this?",
    "What can you do for me?",
    "Please sort this out soon.",
    "I hope you can help.",
    "Could you look into it?",
    "Please get back to me.",
    "What should I do now?",
    "Who can take care of this?",
    "I would like an answer today.",
    "Please tell me what happens next.",
    "Can someone deal with it?",
    "Thanks in advance.",
)

MESSAGES = {
    "address": (
        "I am moving house, so my {p} has to go to a new address.",
        "I typed the wrong address when I ordered the {p} {when}.",
        "The {p} I ordered {when} is going to my old address.",
        "I gave the wrong street number for the delivery of my {p}.",
        "My {p} should be shipped to my office and not to my home.",
        "I moved {when}, and the {p} is still being sent to my old flat.",
    ),
    "broken": (
        "My {p} arrived {when} with a big crack down one side.",
        "The {p} was already broken when I opened the box {when}.",
        "I unpacked the {p} {when} and found it smashed.",
        "The courier brought my {p} {when}, but it is badly dented and bent.",
        "The {p} I received {when} was damaged in the post.",
        "My new {p} was in pieces when it got here {when}.",
    ),
    "cancel": (
        "I ordered the {p} {when}, but I want to cancel the order.",
        "I no longer need the {p} I ordered {when}, so please do not ship it.",
        "The {p} has not shipped yet, and I would like to cancel it.",
        "Please stop my order for the {p} before it leaves the warehouse.",
        "I ordered the {p} by mistake {when} and want it cancelled.",
        "My order for the {p} went in {when}, and I need it called off.",
    ),
    "coupon": (
        "My discount code did not work when I bought the {p} {when}.",
        "I forgot to enter my coupon when I paid for the {p} {when}.",
        "The coupon for the {p} was not taken off my bill.",
        "I paid the full price for the {p} {when} although I had a coupon.",
        "Your site ignored my ten percent code when I ordered the {p}.",
        "I had a voucher for the {p}, but I was charged the full price {when}.",
    ),
    "double_charge": (
        "My bank shows that I paid for the {p} twice {when}.",
        "I bought one {p} {when} and you charged me two times.",
        "There are two payments for the same {p} on my card.",
        "You took the money for my {p} twice {when}.",
        "I was billed double for the {p} {when}.",
        "My card was charged two times {when} for a single {p}.",
    ),
    "invoice": (
        "I bought the {p} for work {when} and I need the invoice.",
        "My accountant wants an invoice for the {p} I bought {when}.",
        "There was no invoice in the box with my {p}.",
        "I cannot claim the {p} as an expense without an invoice.",
        "Where do I find the invoice for the {p} I ordered {when}?",
        "I paid for the {p} {when} but never received an invoice.",
    ),
    "lost": (
        "The tracking page says my {p} was delivered {when}, but nothing is here.",
        "I never got the {p}, and the parcel has vanished from the tracking page.",
        "The courier told me {when} that the parcel with my {p} is lost.",
        "The parcel with the {p} was marked delivered {when}, yet I never saw it.",
        "It seems the {p} got lost in the mail, because the parcel never came.",
        "Somebody signed for my {p} {when}, but I never got the parcel.",
    ),
    "missing_part": (
        "I unpacked the {p} {when} and one of the parts is missing.",
        "The box with my {p} came {when} without one of the pieces.",
        "I cannot put the {p} together because a part is missing.",
        "My {p} arrived {when}, but a small part was left out.",
        "I counted the pieces of the {p} {when}, and there was one too few.",
        "The {p} came {when} with every part on the list except one.",
    ),
    "repair": (
        "My {p} stopped working {when} after only three months.",
        "I have had the {p} for a year, and {when} it simply died.",
        "The {p} worked well for months, but {when} it gave up.",
        "My {p} is still under warranty, and it broke down {when}.",
        "After half a year of use, the {p} failed {when}.",
        "The {p} I bought last spring has quit and is still under warranty.",
    ),
    "return": (
        "I changed my mind about the {p} that came {when} and want my money back.",
        "The {p} is fine, but I do not like it and want to return it.",
        "I got the same {p} as a present {when}, so I want to send mine back.",
        "The {p} I received {when} is too big for me, so I want to return it.",
        "My wife hates the {p} that came {when}, so it has to go back.",
        "I have not used the {p} and would like to return it.",
    ),
    "stock": (
        "I want to buy the {p}, but it has been sold out for weeks.",
        "Your shop has no {p} left, and I really want one.",
        "The {p} sold out {when} before I could buy one.",
        "I keep checking your site, but the {p} is never available.",
        "The page for the {p} says that it is out of stock.",
        "I tried to order the {p} {when}, but there were none left.",
    ),
    "wrong_item": (
        "I ordered the {p}, but the box that came {when} had something else in it.",
        "You sent me the wrong thing {when} instead of the {p}.",
        "The label on the box says {p}, but there is a different item inside.",
        "I opened my parcel {when}, and it was not the {p} I paid for.",
        "Someone mixed up my order {when}, because this is not the {p} I chose.",
        "What arrived {when} is not the {p} that I asked for.",
    ),
}
PROBLEMS = tuple(MESSAGES)

# --- what the desk answers ------------------------------------------------------------------------

LEADS = ("I will", "I'll", "We will", "We'll", "I am going to", "Our team will")
TAILS = ("", "today", "right away", "this afternoon", "within the hour", "by tomorrow")

# A remedy sentence is lead + remedy + tail; the one right remedy for each problem, all different.
REMEDIES = {
    "address": (
        "update the delivery address[ for the {p}]",
        "change the address on your order[ for the {p}]",
        "redirect the order to your new address[ with the {p}]",
        "put the new address on the shipment[ of the {p}]",
        "correct the shipping address[ for your {p}]",
        "enter your new address for the delivery[ of the {p}]",
    ),
    "broken": (
        "send you a free replacement[ {p}]",
        "ship you a brand new one at no cost[ to replace the {p}]",
        "replace the broken item free of charge[ with a new {p}]",
        "post you an undamaged replacement[ for the {p}]",
        "send out a new unit free of charge[ for your {p}]",
        "have a free replacement shipped to you[ for the {p}]",
    ),
    "cancel": (
        "cancel the order[ for the {p}]",
        "cancel your purchase[ of the {p}]",
        "call off the order[ for your {p}]",
        "stop the order before shipment[ of the {p}]",
        "withdraw the order[ for the {p}]",
        "void your order[ for the {p}]",
    ),
    "coupon": (
        "apply the coupon and refund the difference[ on the {p}]",
        "honor your discount code[ on the {p}]",
        "take the discount off the price[ of the {p}]",
        "add the coupon to your order[ for the {p}]",
        "correct the price with your coupon[ for the {p}]",
        "deduct the discount from your bill[ for the {p}]",
    ),
    "double_charge": (
        "refund the second charge[ for the {p}]",
        "return the extra payment to your card[ for the {p}]",
        "reverse the duplicate charge[ for your {p}]",
        "refund the duplicate payment[ for your {p}]",
        "credit the second payment back to you[ for the {p}]",
        "undo the double charge on your card[ for the {p}]",
    ),
    "invoice": (
        "email you the invoice[ for the {p}]",
        "send the invoice to your inbox[ for your {p}]",
        "forward you a copy of the invoice[ for the {p}]",
        "email a full tax invoice to you[ for the {p}]",
        "attach the invoice to an email[ about the {p}]",
        "get the invoice emailed to you[ for your {p}]",
    ),
    "lost": (
        "trace the parcel and ship again[ with another {p}]",
        "track down the parcel and send a second one[ with the {p}]",
        "open a search for the parcel and resend the order[ for the {p}]",
        "have the parcel traced and dispatch a second one[ with your {p}]",
        "chase the missing parcel and ship a new one[ with the {p}]",
        "start a parcel trace and send the order again[ with your {p}]",
    ),
    "missing_part": (
        "post the missing part[ for your {p}]",
        "send the missing piece by mail[ for the {p}]",
        "ship the part you need free of charge[ for your {p}]",
        "mail you the part that was left out[ of the {p} box]",
        "put the missing part in the post[ for your {p}]",
        "get the missing piece delivered to you[ for the {p}]",
    ),
    "repair": (
        "book a warranty repair[ for the {p}]",
        "arrange a free repair[ of your {p}]",
        "schedule a repair with our workshop[ for the {p}]",
        "have our technician repair the fault[ in your {p}]",
        "set up a warranty repair[ for your {p}]",
        "reserve a repair slot[ for the {p}]",
    ),
    "return": (
        "set up a return and refund the price[ of the {p}]",
        "open a return for a full refund[ of the {p}]",
        "accept the return and pay back the price[ of the {p}]",
        "give you a return code for a refund[ on the {p}]",
        "arrange a return with a full refund[ for your {p}]",
        "take the item back and refund you[ for the {p}]",
    ),
    "stock": (
        "add you to the waiting list[ for the {p}]",
        "put your name on the waiting list[ for the {p}]",
        "set a stock alert for you[ on the {p}]",
        "sign you up for stock alerts[ on the {p}]",
        "save you a place in the restock queue[ for the {p}]",
        "register you for a restock message[ about the {p}]",
    ),
    "wrong_item": (
        "send you a prepaid label and exchange the item[ for the {p}]",
        "send a prepaid label and swap the item[ for the right {p}]",
        "email a free return label and exchange what you got[ for the {p}]",
        "arrange a free exchange with a prepaid label[ for the {p}]",
        "send a prepaid label and ship the correct order[ with the {p}]",
        "collect the wrong item for free and exchange it[ for the {p}]",
    ),
}

APOLOGIES = (
    "I'm so sorry[ about your {p}].",
    "I'm very sorry for the trouble[ with the {p}].",
    "I sincerely apologize for the inconvenience[ with your {p}].",
    "Please accept our apologies[ regarding the {p}].",
    "We're terribly sorry for the bother[ with your {p}].",
    "My sincere apologies for the hassle[ with the {p}].",
    "We truly regret the trouble you have had[ with the {p}].",
    "That must be frustrating, and I am truly sorry[ about the {p}].",
)
THANKS = (
    "Thank you for getting in touch[ about your {p}].",
    "Thanks so much for your message[ about the {p}].",
    "Many thanks for letting us know[ about the {p}].",
    "We really appreciate your note[ about your {p}].",
    "Thank you for reaching out[ about the {p}].",
    "It is kind of you to write to us[ about your {p}].",
)
GREETINGS = (
    "Hello, I would be glad to help[ with your {p}].",
    "Good day, it is a pleasure to assist you[ with the {p}].",
    "Hi there, I'm happy to help you[ with the {p}].",
    "Dear customer, we are delighted to help[ with your {p}].",
    "Hello there, of course I can help[ with the {p}].",
    "Hello, we will gladly look after you[ and your {p}].",
)
CLOSINGS = (
    "Please let me know if you need anything else.",
    "Have a lovely day.",
    "Thank you for your understanding.",
    "Feel free to write to me at any time.",
    "Take care and all the best.",
    "Kind regards from the whole team.",
    "We wish you a wonderful week.",
)
CURT = (
    "Message received[ about the {p}].",
    "Ticket opened[ for the {p}].",
    "Your case is on file[ for the {p}].",
    "Case logged[ for the {p}].",
    "I read your note[ about the {p}].",
    "I checked the record[ for your {p}].",
    "Entry made[ for the {p}].",
    "Request seen[ for the {p}].",
)
RUDE = (
    "You clearly did something silly[ with the {p}].",
    "Stop whining[ about your {p}].",
    "Nobody here cares[ about your {p}].",
    "What a pointless complaint[ about the {p}].",
    "You should have read the small print[ for the {p}].",
    "Only a fool would make such a fuss[ over the {p}].",
    "Do not waste my time[ with your {p}].",
    "I am tired of people like you[ and your {p}].",
)
# Said instead of a remedy: polite to nobody and of no use to anybody.
STALLS = (
    "We have no update at the moment[ on the {p}].",
    "Somebody may look at it one day[ and check the {p}].",
    "There is nothing to report so far[ on your {p}].",
    "These things can take a while[ with the {p}].",
    "It is hard to say more for now[ about the {p}].",
    "We are not sure what will happen next[ with the {p}].",
    "I do not have the file in front of me[ for your {p}].",
)
# A rambling sentence is start + middle + end.
RAMBLE_STARTS = (
    "By the way,", "Funnily enough,", "On a side note,", "Speaking of which,",
    "Not that it matters, but", "You know,", "As it happens,",
)  # fmt: skip
RAMBLE_MIDDLES = (
    "the weather here has been dreadful",
    "the canteen has stopped serving soup",
    "my cousin is learning to play chess",
    "our car park is full of puddles",
    "the new carpet in the hall smells odd",
    "my neighbor has bought a second parrot",
    "the lift in our building squeaks",
    "my aunt has started to paint ducks",
)
RAMBLE_ENDS = (
    ", and everyone here has an opinion on it.",
    ", which reminds me of a long summer abroad.",
    ", so we have talked about little else since Easter.",
    ", and I could go on about that for hours.",
    ", though my boss says I should not mention it.",
    ", and that is just how things go, I suppose.",
    ", which is a story I would love to tell someday.",
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

# SPDX-License-Identifier: Apache-2.0
"""What is not put to the model: what is no text, what it must not answer, and what is meant to turn it.

The model describes the image of the surgical field. Whom it shows, what ails them, how it will end and what to do are
not in that image, or not for this software to say, and a language model would answer all the same. So such questions
are refused by rule, before they cost anything. The rules read English; letters of other scripts are refused as a whole.
What they do not spell out, `Router` knows by likeness to examples. Neither is a proof; the last fence is that the model
sees nothing but the image and the question, and that nothing it writes moves anything.
"""

from __future__ import annotations

import re
import unicodedata

MAX_CHARACTERS = 500

OUT_OF_SCOPE = (
    "The question is like those that are not answered: people, health, outcome, advice, commands, other matters. "
    "Ask about what the image shows."
)
"""What to say where `Route.declined`."""

_INVISIBLE = "Cf"  # zero-width and direction marks
_FORBIDDEN = ("Cc", "Cs", "Co", "Cn")  # control characters, lone surrogates, private, unassigned


class QuestionRefused(ValueError):
    """A question that is not put to the model.

    Attributes:
        code_name: "INVALID_QUESTION", "DECLINED" or "UNKNOWN_TASK", as in surg_perception_msgs/QuestionError.
    """

    def __init__(self, code_name: str, message: str) -> None:
        super().__init__(message)
        self.code_name = code_name


def check_question(text: str | bytes) -> str:
    """The question with single spaces and without invisible characters.

    Args:
        text: as it came in; bytes are read as UTF-8.

    Raises:
        QuestionRefused: INVALID_QUESTION for what is empty, longer than `MAX_CHARACTERS`, no text in Latin letters, or
            holds markup that language models take for control tokens; DECLINED for questions about people, diagnosis,
            outcome and treatment, for commands, and for attempts to give the model other instructions.
    """
    question = _cleaned(text)
    folded = _folded(question)
    if _MARKUP.search(folded):
        raise _invalid("The question holds markup or control tokens of a language model; write it in plain words.")
    for patterns, reason in _DECLINED:
        if any(pattern.search(folded) for pattern in patterns):
            raise QuestionRefused("DECLINED", reason)
    return question


def _invalid(reason: str) -> QuestionRefused:
    return QuestionRefused("INVALID_QUESTION", reason)


def _cleaned(text: str | bytes) -> str:
    if len(text) > MAX_CHARACTERS * (4 if isinstance(text, bytes) else 1):  # before anything that takes time
        raise _too_long(len(text), "bytes" if isinstance(text, bytes) else "characters")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _invalid(f"The question is not UTF-8 text: {error.reason} at byte {error.start}.") from None
        if len(text) > MAX_CHARACTERS:
            raise _too_long(len(text), "characters")
    text = re.sub(r"[\t\n\r\v\f\x85\u2028\u2029]", " ", text)
    for character in text:
        category = unicodedata.category(character)
        if category in _FORBIDDEN or character == "\ufffd":
            raise _invalid(f"The question holds a character that is no text (U+{ord(character):04X}).")
    text = "".join(character for character in text if unicodedata.category(character) != _INVISIBLE)
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if not text:
        raise _invalid("The question is empty: ask something, such as: Where is the hook?")
    letters = [character for character in unicodedata.normalize("NFKC", text) if character.isalpha()]
    if 2 * len(letters) < len(text) - text.count(" ") or not re.search(r"[^\W\d_]{2}", text):
        raise _invalid("The question is not made of words: ask something, such as: Where is the hook?")
    foreign = next((letter for letter in letters if not unicodedata.name(letter, "").startswith("LATIN")), None)
    if foreign:
        raise _invalid(f"The question has letters that are not Latin ({foreign}); the model reads English.")
    return text


def _too_long(count: int, unit: str) -> QuestionRefused:
    return _invalid(f"The question has {count} {unit}; at most {MAX_CHARACTERS} characters are read.")


_LEET = str.maketrans("013457@$", "oieastas")


def _folded(question: str) -> str:
    """For the rules: lower case, no accents, one kind of quote, spelled-out letters joined, digits in words read."""
    decomposed = unicodedata.normalize("NFKD", question)
    text = "".join(character for character in decomposed if not unicodedata.combining(character)).casefold()
    text = re.sub("[\u2018\u2019\u02bc\u00b4]", "'", text)
    text = re.sub(r"\b(?:[a-z][\s.*_-]+){3,}[a-z]\b", lambda match: re.sub(r"[^a-z]", "", match.group()), text)
    text = re.sub(r"(?<=[a-z])[013457@$]+(?=[a-z])", lambda match: match.group().translate(_LEET), text)
    return re.sub(r"\s+", " ", text)


_PERSON = (
    r"(?:(?:the |this |that |our |your |a |my )?(?:\w+ )?(?:patient|surgeon|doctor|physician|nurse|assistant|operator|"
    r"person|individual|man|woman|lady|guy|girl|boy|human|somebody|someone|team|hospital))"
)
_ORGAN = (
    r"(?:it|this|that|they|these|those|everything|(?:the |this |that )?(?:\w+ )?(?:liver|gall ?bladder|duct|artery|"
    r"tissue|organ|anatomy|bowel|gut|omentum|stomach|abdomen|wall|vessel|peritoneum|plate|colou?r))"
)
_ACT = (
    r"(?:cut|clip|dissect|remove|proceed|go|start|begin|continue|coagulate|cauteri[sz]e|divide|transect|pull|open|"
    r"close|stop|resect|ligate|suture|staple|retract|grasp|extract|excise|convert|operate|burn)"
)
_TRAIT = (
    r"(?:(?:first |last |full |real )?name|age|sex|gender|identity|race|ethnicity|nationality|birthday|date of birth|"
    r"weight|height|bmi|address|initials|medical history|history)"
)


def _phrases(*patterns: str) -> re.Pattern[str]:
    """One pattern for several phrases; PERSON, ORGAN, ACT and TRAIT stand for the lists above."""
    lists = {"PERSON": _PERSON, "ORGAN": _ORGAN, "ACT": _ACT, "TRAIT": _TRAIT}
    joined = "|".join(f"(?:{pattern})" for pattern in patterns)
    return re.compile(r"\b(?:" + re.sub(r"\b[A-Z]{3,}\b", lambda match: lists[match.group()], joined) + r")(?!\w)")


def _words(text: str) -> re.Pattern[str]:
    """One pattern for several words; * stands for any ending."""
    return _phrases(*(re.escape(word).replace(r"\*", r"\w*") for word in text.split()))


_MARKUP = re.compile(
    r"<\s*\||\|\s*>|<\s*/?\s*[a-z][^<>]{0,40}>|<<|>>|#{2,}|`{3}|\{\{|\}\}|\$\{|\{%|https?:|www\.|\\[nrtux]|"
    r"\[\s*/?\s*(?:inst|sys|system|cls|sep|mask|pad|unk|end|start|bos|eos)\s*\]"
)

_IDENTITY = (
    _words("whom whose"),
    _phrases(
        r"who(?:'s| is| are| was| were) (?:PERSON|he|she|it|this|that|they|you|there|in charge|being operated)",
        r"who (?:is )?(?:perform|operat|carr)\w* .*(?:operation|surgery|procedure|here)",
        r"who(?:'s| is) (?:operating|performing)",
        r"(?:PERSON'?s?'?|his|her|their|your) TRAIT",
        r"TRAIT (?:and \w+ )?of PERSON",
        r"(?:name|identify|recogni[sz]e) PERSON(?=$|[?.!]| and| in| from| by| here)",
        r"PERSON .{0,12}(?:called|named)",
        r"how old|(?:what|which) age|how (?:tall|heavy|fat) .*PERSON",
        r"(?:fe)?male or (?:fe)?male|(?:wo)?man or (?:a )?(?:wo)?man",
        r"(?:it|this|that|he|she|PERSON) (?:a )?(?:male|female|man|woman|boy|girl|child|adult|pregnant|young|old|"
        r"older|obese|overweight|fat|diabetic|smoker|black|white|asian)",
        r"(?:which|what) (?:hospital|clinic)|in (?:which|what) (?:city|country)",
        r"where does PERSON (?:live|come from|work)|what do you know about PERSON",
        r"patients?'s?|medical records?|(?:social security|insurance) number|personal (?:data|information|details)",
    ),
)

_DIAGNOSIS = (
    _words(
        "diagnos* cancer* carcinoma* tumor* tumour* malignan* benign metasta* neoplas* lesion lesions pathology "
        "pathologic* pathologies diseas* cirrho* cholecystitis gallstone* cholelithiasis hepatitis fibro* necro* "
        "gangren* infect* inflam* ischem* ischaem* abscess* polyp polyps steatosis abnormal* anomal* unhealthy sepsis "
        "septic symptom* syndrome* disorder* cyst cysts peritonitis endometriosis illness* biops* histolog* suffer*"
    ),
    _phrases(
        r"(?:is|are|was|were|do|does|look|looks|looking|appears?|seems?) (?:.{0,11} )?ORGAN(?: .{0,24})? (?:normal|"
        r"healthy|sick|ill|bad|suspicious|dangerous|worrying|concerning|intact)(?! (?:speed|pace|position|direction))",
        r"(?:normal|healthy|sick) (?:or|ORGAN|appearance|finding)",
        r"what(?:'s| is) (?:wrong|the matter)|anything (?:wrong|suspicious|unusual|worrying|concerning)",
        r"(?:does|did|has|have|had|is|was|are|were|can|could) PERSON (?:have|had|got|sick|ill|healthy|ok|okay|"
        r"bleeding|stable|alive|awake|conscious|asleep|in pain)",
        r"signs? of \w+(?: \w+)?(?=\?|$)|(?:what|which|medical|health) (?:condition|problem)|condition of PERSON",
        r"how is PERSON(?! (?:holding|using|moving))|vital signs|blood pressure|heart rate|fatty liver|gall stones?",
    ),
)

_OUTCOME = (
    _words(
        "surviv* die dies died dying death dead deadly fatal lethal kill kills killed prognos* complication "
        "complications mortality outcome outcomes recovery success* succeed* fail fails failed failing failure risk "
        "risks risky injur* perforat* damag* harm* hurt* mistake* error errors malpractice fault blame liab* "
        "negligen* competen* incompeten* lawsuit skill* correctly properly wrongly incorrectly chance chances "
        "discharged readmi*"
    ),
    _phrases(
        r"life expectancy|bile leak|hospital stay|go home|side effects?|quality of life|what will happen",
        r"recover(?:s|ed|ing)?(?! the)|make it(?! (?:to|left|right))",
        r"(?:be|get) (?:ok|okay|fine|alright|all right|cured|healed|well|better|healthy|saved)",
        r"(?:go|goes|going|went|gone|turn out|end up) (?:well|wrong|badly|fine|bad|good)",
        r"how (?:good|well|experienced|bad) .*(?:PERSON|perform\w*|done|operation|surgery|procedure)",
        r"PERSON (?:a )?(?:good|bad|doing well|novice|expert|beginner|experienced|trained)",
        r"(?:rate|grade|judge|assess|evaluate|critici[sz]e) (?:the |this |their )?(?:\w+ )?(?:surgeon|surgery|"
        r"operation|performance|technique|procedure)",
        r"(?:will|would|is|are) PERSON (?:going to |gonna )?(?:need|have|get|feel|be|recover|live|wake|walk|eat|make)",
        r"(?:he|she) (?:will|going to|gonna|would)|(?:will|would) (?:he|she)",
    ),
)

_ADVICE = (
    _words(
        "should shouldn't ought advice advise* recommend* suggest* safe safely safety dangerous treat treats treated "
        "treating treatment* therap* medicat* medicine drug drugs dose doses dosage antibiotic* prescri* anesthe* "
        "anaesthe*"
    ),
    _phrases(
        r"(?:must|has to|have to|needs? to) (?!know|see|find|understand|hear|learn|look|identify|count|locate|ask|"
        r"say)\w+",
        r"supposed to|would you (?:do|use|choose|prefer|ACT)|what now|teach me",
        r"(?:do|step|move|action|ACT) next(?! to)|next (?:step|steps|move|action|target|cut|clip)",
        r"(?:best|better|right|correct|optimal|ideal|proper) (?:way|place|spot|move|instrument|tool|time|moment|plane|"
        r"angle|approach|technique) (?:to|for|of)",
        r"(?:time|ready|ok|okay|fine|allowed|possible|wise|necessary|permitted|appropriate) to (?:now )?ACT",
        r"(?:do|shall) (?:i|we) (?:now )?ACT|(?:can|may|could|might) (?:i|we|you|they|he|she|one|PERSON)(?: now| "
        r"safely| already| just)* ACT",
        r"how (?:to|(?:do|can|could|would|shall|might) (?:i|we|you|one)) (?!see|tell|know|find|recogni|describe|call|"
        r"name|spot|identify|count|summari|caption|put|say|explain)\w+",
        r"where (?:do|can|shall|to) (?:i |we )?ACT|(?:surgery|operation) (?:necessary|needed|required)|convert to open",
    ),
)

_ASKED_KINDLY = (
    r"^(?:(?:please|now|ok|okay|hey|hi|hello|robot|dvrk|then|and|quickly|slowly|just|kindly|immediately|can you|could "
    r"you|would you|will you|i want you to|you must|go ahead and|try to|let's|let us|start to|begin to)[,!.:]? )*"
)
_MOTION = (
    r"(?:move|cut|clip|grasp|grab|pull|push|retract|dissect|coagulate|cauteri[sz]e|burn|irrigate|aspirate|suck|rotate|"
    r"turn|open|close|release|stop|start|advance|withdraw|insert|lift|lower|raise|zoom|pan|tilt|go|drive|bring|take|"
    r"hold|drop|fire|activate|deactivate|switch|halt|freeze|remove|staple|suture|inject|approach|touch|steer|home|"
    r"park|set|let|follow|place|press|squeeze|tighten|swap|exchange|increase|decrease|reduce|disable|enable|engage|"
    r"pause|resume|reset|shut|divide|transect|ligate)"
)
_OBJECT = (
    r"(?:the|it|that|this|your|a|an|to|left|right|up|down|upwards?|downwards?|forwards?|backwards?|back|away|here|"
    r"there|now|more|off|in|out|them|his|her|all|both|go|arms?|camera|instruments?|tool|robot|gripper|jaws?|joint|"
    r"psm\d?|ecm|slowly|slightly|gently|carefully|quickly|faster|slower|\d+)"
)
_COMMAND = (
    re.compile(rf"{_ASKED_KINDLY}{_MOTION}(?: {_OBJECT}\b(?! (?:look|moment)\b)|[.!,]|$)"),
    re.compile(rf"\b(?:robot|dvrk|da vinci|psm ?\d?)\b[,:!]? (?:please )?{_MOTION}\b"),
    _phrases(
        r"(?:tell|make|let|have|get|command|order|instruct|control|drive|steer|teleoperate|want|stop|start) (?:the |"
        r"your |this )?(?:robot|dvrk|arms?|psm|ecm|instrument|gripper|camera)",
        r"motion commands?|cmd_vel|servo_\w+",
    ),
)

_INJECTION = (
    _words(
        "pretend* roleplay* role-play* impersonat* jailbreak* sudo unrestricted uncensored hypothetical* translate "
        "chatgpt"
    ),
    _phrases(
        r"(?:ignore|disregard|forget|override|overwrite|bypass|skip|drop|neglect|discard|violate|break|dismiss|obey|"
        r"ignoring|forgetting|disregarding) .{0,40}(?:instructions?|prompts?|rules?|messages?|context|guidelines?|"
        r"restrictions?|training|polic\w+|filters?|constraints?|everything|anything|orders?|limits|told|above|"
        r"previous)",
        r"you(?:'re| are) (?:now|no longer|a|an|not|free|allowed|my|to)|from now on|system ?(?:prompt|message|"
        r"instructions?)",
        r"(?:your|initial|hidden|secret|original|earlier|previous|prior|above|preceding|new|following|these) (?:\w+ "
        r")?(?:prompt|instruction|rule|guideline|directive|command|order)s?",
        r"repeat (?:the|this|all|every\w*|my|after|back|what|above|your)",
        r"(?:text|words|message|prompt|content|sentence)s? (?:above|before this)",
        r"(?:print|output|reveal|show|tell|leak|display|echo|dump|give|say|write|what(?:'s| is| are)) "
        r".{0,30}(?:prompt|instructions|passwords?|secrets?|api keys?|credentials|source code)",
        r"(?:act|behave|speak) (?:as|like)|imagine (?:you|that you|being)|play the (?:role|part)|be my|answer as "
        r"(?:if|a|an)",
        r"your (?:new )?(?:role|task|job|name|persona|character) (?:is|will be|now)|new (?:instructions?|rules?|task)",
        r"do anything now|(?:developer|debug|admin|god|maintenance|root|dan) mode|role play|prompt injection|language "
        r"model",
        r"without (?:any )?(?:restrictions?|filters?|rules?|limits?)|no matter what|always (?:answer|say|reply|"
        r"respond)",
        r"(?:only|just|simply) (?:say|reply|respond|output)|(?:say|reply|respond|output|print|write|answer)(?: with| "
        r"only)* [\"'\u201c]\w+",
        r"(?:system|assistant|user|human|ai|bot|instructions?|response|answer)(?= ?:)",
        r"end of (?:prompt|instructions?|question|input|context)|who (?:made|created|trained|programmed|built) you",
    ),
)

_DECLINED = (
    (_INJECTION, "The question tries to give the model other instructions; ask about what the image shows."),
    (_COMMAND, "This is a command. Nothing here moves an instrument or a camera; ask about what the image shows."),
    (_IDENTITY, "Questions about who somebody is are not answered; ask about what the image shows."),
    (_DIAGNOSIS, "Questions about disease and health are not answered; ask about instruments, actions and phase."),
    (_OUTCOME, "Questions about outcome, risk or anyone's skill are not answered; ask about what the image shows."),
    (_ADVICE, "Advice on what to do is not given; ask about what the image shows."),
)

# SPDX-License-Identifier: Apache-2.0
"""What is not put to the model: what is no text, what it must not answer, and what is meant to turn it.

The model describes the image of the surgical field. Whom it shows, what ails them, how it will end and what to do are
not in that image, or not for this software to say, and a language model would answer all the same. So such questions
are refused by rule, before they cost anything. The rules read English; letters of other scripts are refused as a whole.
They are a courtesy and a fence against accidents, not a proof: the model sees nothing but the image and the question,
and nothing that it writes moves anything.
"""

from __future__ import annotations

import re
import unicodedata

MAX_CHARACTERS = 500

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
    for pattern, reason in _MARKUP:
        if pattern.search(folded):
            raise _invalid(reason)
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
    text = re.sub("[\u2018\u2019\u02bc`\u00b4]", "'", text)
    text = re.sub(r"\b(?:[a-z][\s.*_-]+){3,}[a-z]\b", lambda match: re.sub(r"[^a-z]", "", match.group()), text)
    text = re.sub(r"(?<=[a-z])[013457@$]+(?=[a-z])", lambda match: match.group().translate(_LEET), text)
    return re.sub(r"\s+", " ", text)


def _any(*patterns: str) -> tuple[re.Pattern[str], ...]:
    """Patterns; `~P` stands for a person, `~O` for an organ or "this", `~A` for an action on tissue."""
    persons = r"(?:(?:the |this |that |our |your |a |my )?(?:\w+ )?(?:patient|surgeon|doctor|physician|nurse|"
    persons += r"assistant|operator|person|individual|man|woman|lady|guy|girl|boy|human|somebody|someone|team|hospital))"
    organs = r"(?:it|this|that|they|these|those|everything|(?:the |this |that )?(?:\w+ )?(?:liver|gall ?bladder|duct|"
    organs += r"artery|tissue|organ|anatomy|bowel|gut|omentum|stomach|abdomen|wall|vessel|peritoneum|plate|color|colour))"
    actions = r"(?:cut|clip|dissect|remove|proceed|go|start|begin|continue|coagulate|cauteri[sz]e|divide|transect|pull|"
    actions += r"open|close|stop|resect|ligate|suture|staple|retract|grasp|extract|excise|convert|operate|burn|press on)"
    spelled = (pattern.replace("~P", persons).replace("~O", organs).replace("~A", actions) for pattern in patterns)
    return tuple(re.compile(pattern) for pattern in spelled)


_MARKUP = tuple(
    (pattern, "The question holds markup or control tokens of a language model; write it in plain words.")
    for pattern in _any(
        r"<\s*\|", r"\|\s*>", r"<\s*/?\s*[a-z][^<>]{0,40}>", r"<<|>>", r"\[\s*/?\s*(?:inst|sys|system|cls|sep|mask|pad|unk|end|start|bos|eos)\s*\]",
        r"#{2,}", r"`{3}", r"\{\{|\}\}|\$\{|\{%", r"https?:|www\.", r"\\[nrtux]",
    )
)  # fmt: skip

_IDENTITY = _any(
    r"\bwho(?:'s| is| are| was| were) (?:~P\b|(?:he|she|it|this|that|they|you|there|in charge|being operated|operated on)\b)",
    r"\bwho(?:'s| is| are| was| were)? (?:operat|perform|carr)(?:es|ed|ing|ying|ies|s|e)?\b.*\b(?:operation|surgery|procedure|him|her|here)\b",
    r"\bwho(?:'s| is) (?:operating|performing|at the console)\b",
    r"\bwho(?:m|se)\b(?! (?:tip|shaft|jaw|handle))",
    r"\b~P(?:'s|s')? (?:first |last |full |real )?(?:name|age|sex|gender|identity|race|ethnicity|nationality|birthday|weight|height|bmi|id|record|history|face)\b",
    r"\b(?:name|age|sex|gender|identity|race|ethnicity|nationality|date of birth|birthday|weight|height|address|medical history|initials|id) (?:and \w+ )?of ~P\b",
    r"\b(?:his|her|their|your) (?:first |last |full |real )?(?:name|age|sex|gender|identity|race|ethnicity|nationality|birthday|weight|height|bmi)\b",
    r"\b(?:name|identify|recogni[sz]e|reidentify|identity of) ~P(?:s)?(?! (?:is|are|use|uses|using|hold|holds|holding|work|works)\b)(?:\?|\.|!|$| and\b| in\b| from\b| by\b| here\b)",
    r"\b~P\b.{0,20}\b(?:called|named)\b",
    r"\bhow old\b", r"\bwhat age\b", r"\bwhich age\b", r"\bhow (?:tall|heavy|fat)\b.*\b~P\b",
    r"\b(?:fe)?male or (?:fe)?male\b", r"\b(?:a |the )?(?:wo)?man or (?:a )?(?:wo)?man\b", r"\bis (?:it|this|that|he|she|~P) (?:a )?(?:male|female|boy|girl|man|woman|child|adult)\b",
    r"\b~P (?:a )?(?:male|female|man|woman|boy|girl|pregnant|young|old|older|obese|overweight|fat|diabetic|smoker|black|white|asian)\b",
    r"\bwhich hospital\b", r"\bwhat hospital\b", r"\bin (?:which|what) (?:hospital|clinic|city|country)\b", r"\bpersonal (?:data|information|details)\b",
    r"\bpatients?(?:'s|s')", r"\bwhat do you know about ~P\b", r"\b(?:social security|insurance) number\b", r"\bmedical record",
    r"\bwhere does ~P (?:live|come from|work)\b",
)  # fmt: skip

_DIAGNOSIS = _any(
    r"\bdiagnos", r"\bcancer", r"\bcarcinoma", r"\btumou?r", r"\bmalignan", r"\bbenign\b", r"\bmetasta", r"\bneoplas", r"\blesions?\b",
    r"\bpathology\b", r"\bpathologic", r"\bpathologies\b", r"\bdiseas", r"\bcirrho", r"\bcholecystitis", r"\bgall ?stones?\b", r"\bcholelithiasis", r"\bhepatitis",
    r"\bfibro", r"\bnecro", r"\bgangren", r"\binfect", r"\binflam", r"\bischa?emi", r"\babscess", r"\bpolyps?\b", r"\bsteatosis", r"\bfatty liver",
    r"\babnormal", r"\banomal", r"\bunhealthy\b", r"\bsepsis\b", r"\bseptic\b", r"\bsymptoms?\b", r"\bsyndrome", r"\bdisorder", r"\bcysts?\b", r"\bperitonitis", r"\bendometriosis",
    r"\b(?:is|are|was|were|do|does|look|looks|looking|appear|appears|seem|seems)\b.{0,12}\b~O\b.{0,25}\b(?:normal|healthy|sick|ill|bad|suspicious|dangerous|worrying|concerning|sound|intact|diseased)\b(?! (?:speed|pace|position|direction))",
    r"\b(?:normal|healthy|sick) (?:or|liver|gall ?bladder|tissue|organ|anatomy|appearance|finding)",
    r"\bwhat(?:'s| is) (?:wrong|the matter)\b", r"\banything (?:wrong|suspicious|unusual|worrying|concerning)\b", r"\bsigns? of\b(?! (?:the )?(?:hook|grasper|clipper|irrigator|scissors|bipolar|movement|motion|life in the))",
    r"\b(?:does|did|has|have|had|is|was|are|were|can|could) ~P (?:have|had|has|suffer|suffering|got|sick|ill|healthy|ok|okay|bleeding|stable|alive|awake|conscious|asleep|in pain)\b",
    r"\bsuffer(?:s|ing|ed)?\b", r"\b(?:what|which) (?:medical |health )?condition\b", r"\bcondition of ~P\b", r"\bhow is ~P\b(?! (?:holding|using|moving|positioned))", r"\bill(?:ness|nesses)?\b",
    r"\b(?:medical|health) (?:condition|problem|issue)", r"\bbiops", r"\bhistolog", r"\bstage of (?:the )?(?:cancer|disease|tumou?r)", r"\bvital signs?\b", r"\bblood pressure\b", r"\bheart rate\b",
)  # fmt: skip

_OUTCOME = _any(
    r"\bsurviv", r"\b(?:die|dies|died|dying|death|dead|deadly|fatal|lethal|kill|kills|killed)\b", r"\bprognos", r"\bcomplications?\b", r"\bmortality\b", r"\blife expectancy\b",
    r"\boutcomes?\b", r"\brecovery\b", r"\brecover(?:s|ed|ing)?\b(?! the\b)", r"\bsuccess", r"\bsucceed", r"\bfail(?:s|ed|ing|ure)?\b", r"\brisks?\b", r"\brisky\b",
    r"\b(?:be|get) (?:ok|okay|fine|alright|all right|cured|healed|well|better|healthy|saved)\b", r"\b(?:go|goes|going|went|gone|turn out|make it|end up) (?:well|wrong|badly|fine|bad|good)\b", r"\bmake it\b(?! (?:to|left|right))",
    r"\binjur", r"\bperforat", r"\bdamag", r"\bbile leak", r"\bharm(?:s|ed|ful)?\b", r"\bhurt",
    r"\bmistakes?\b", r"\berrors?\b", r"\bmalpractice\b", r"\bfault\b", r"\bblame\b", r"\bliab", r"\bnegligen", r"\bincompeten", r"\bcompeten", r"\bsued?\b", r"\blawsuit",
    r"\bskill(?:s|ed|ful)?\b", r"\bhow (?:good|well|experienced|bad)\b.*(?:\b~P\b|\bperform|\bdone\b|\boperation\b|\bsurgery\b|\bprocedure\b)", r"\b~P (?:a )?(?:good|bad|doing well|novice|expert|beginner|experienced|trained)\b",
    r"\b(?:rate|grade|judge|assess|evaluate|score|criticise|criticize) (?:the |this |their |his |her )?(?:\w+ )?(?:surgeon|surgery|operation|performance|technique|procedure|skill)",
    r"\b(?:done|performed|did|doing|do) (?:\w+ ){0,3}(?:correctly|properly|wrongly|badly|incorrectly)\b", r"\b(?:correctly|properly|wrongly|incorrectly)\b",
    r"\b(?:discharged|hospital stay|go home|long[- ]term|side effects?|quality of life|readmi)", r"\b(?:will|would|is|are) ~P (?:going to |gonna )?(?:need|have|get|feel|be|recover|survive|live|wake|walk|eat|make)\b", r"\b(?:he|she) (?:will|going to|gonna|would)\b|\b(?:will|would) (?:he|she)\b", r"\bwhat will happen\b", r"\bchances?\b",
)  # fmt: skip

_ADVICE = _any(
    r"\bshould(?:n't)?\b", r"\bought\b", r"\b(?:must|has to|have to|needs? to|needed to)\b (?!know|see|find|understand|hear|learn|look|identify|count|locate|ask|check|say|tell)\w+",
    r"\badvi[sc]", r"\brecommend", r"\bsuggest", r"\bsupposed to\b", r"\bwould you (?:do|use|cut|clip|choose|prefer|advise|go|proceed|start|remove|dissect)\b",
    r"\b(?:do|to do|step|move|action|cut|clip|dissect|grasp) next\b(?! to)", r"\bnext (?:step|steps|move|action|target|cut|clip|manoeuvre|maneuver)\b", r"\bwhat now\b",
    r"\bsafe\b", r"\bsafely\b", r"\bsafety\b", r"\bdangerous\b", r"\btreat(?:s|ed|ing|ment|ments)?\b", r"\btherap", r"\bmedicat", r"\bmedicine\b", r"\bdrugs?\b", r"\bdos(?:e|age)s?\b", r"\bantibiotic", r"\bprescri", r"\bana?esthe",
    r"\b(?:best|better|right|correct|optimal|ideal|proper) (?:way|place|spot|move|instrument|tool|time|moment|plane|position|angle|approach|technique) (?:to|for|of)\b", r"\b(?:time|ready|ok|okay|fine|allowed|possible|wise|advisable|necessary|permitted|appropriate) to (?:now )?~A\b",
    r"\b(?:can|may|could|shall|might) (?:i|we|you|they|he|she|one|~P)(?: now| safely| already| just| please)* ~A\b", r"\bhow (?:to|(?:do|can|could|would|shall|might) (?:i|we|you|one))\b (?!see|tell|know|find|recogni|describe|call|name|spot|identify|count|summari|caption|put|say|explain)",
    r"\b(?:do|shall) (?:i|we) (?:now )?~A\b", r"\bwhere (?:do|can|shall|to) (?:i |we )?(?:now )?~A\b", r"\bsurgery (?:necessary|needed|required)\b", r"\bconvert to open\b", r"\b(?:plan|guide|instruct|help) (?:me|us|the)\b.*\b~A", r"\bteach me\b",
)  # fmt: skip

_POLITE = r"^(?:(?:please|now|ok|okay|hey|hi|hello|robot|dvrk|then|and|quickly|slowly|just|kindly|immediately|stop and|can you|could you|would you|will you|i want you to|you must|go ahead and|try to|let's|let us|start to|begin to)[,!.:]? )*"
_COMMAND = _any(
    _POLITE + r"(?:move|cut|clip|grasp|grab|pull|push|retract|dissect|coagulate|cauteri[sz]e|burn|irrigate|aspirate|suck|rotate|turn|open|close|release|stop|start|advance|withdraw|insert|lift|lower|raise|zoom|pan|tilt|go|drive|bring|take|hold|drop|fire|activate|deactivate|switch|halt|freeze|remove|staple|suture|inject|approach|touch|steer|home|park|set|let|follow|place|put|press|squeeze|tighten|swap|change|exchange|increase|decrease|reduce|disable|enable|engage|pause|resume|reset|shut|divide|transect|ligate)"
    r"(?: (?:the|it|that|this|your|a|an|to|left|right|up|down|upwards?|downwards?|forwards?|backwards?|back|away|here|there|now|more|off|in|out|on|them|his|her|all|both|go|one|two|arm|arms|camera|instrument|instruments|tool|robot|gripper|jaws?|joint|psm\d?|ecm|slowly|slightly|gently|carefully|quickly|faster|slower|\d+)\b(?! (?:look|moment|words)\b)|[.!,]|$)",
    r"\b(?:robot|dvrk|da vinci|psm ?\d?|arm|arms|gripper)\b[,:!]? (?:please )?(?:move|cut|clip|grasp|grab|pull|push|stop|go|rotate|turn|open|close|retract|release)\b(?!\?)(?<!the arm move)(?! (?:to the (?:left|right) or|up or))[^?]*$",
    r"\b(?:tell|make|let|have|get|command|order|instruct|control|drive|steer|teleoperate|want) (?:the |your |this )?(?:robot|dvrk|arm|arms|psm|ecm|instrument|gripper|camera)\b", r"\bmotion command", r"\bcmd_vel\b", r"\bservo_",
)  # fmt: skip

_INJECTION = _any(
    r"\b(?:ignore|disregard|forget|overrid|overwrite|bypass|skip|drop|neglect|discard|violate|break|stop following)(?:e|es|ing)?\b.{0,40}\b(?:instruction|prompt|rule|message|context|guideline|restriction|training|polic|filter|constraint|direction|everything|anything|order|limit|safe|told|above|previous|prior)",
    r"\byou(?:'re| are) (?:now|no longer|a|an|not|going to|free|allowed|my|to)\b", r"\bfrom now on\b", r"\bsystem ?(?:prompt|message|instruction)", r"\b(?:your|initial|hidden|secret|original|earlier|previous|prior|above|preceding|new|following|these) (?:\w+ )?(?:prompt|instruction|rule|guideline|directive|command|order)s?\b",
    r"\brepeat (?:the |this |all |every|my |after|back|what|above|your )", r"\b(?:text|words|message|prompt|content|sentence)s? (?:above|before this)\b", r"\b(?:print|output|reveal|show|tell|leak|display|echo|dump|give|say|write|what(?:'s| is| are))\b.{0,30}\b(?:prompt|instructions|passwords?|secrets?|api keys?|credentials|weights file|source code|environment variable)\b",
    r"\bpretend", r"\brole ?-?play", r"\bact (?:as|like)\b", r"\bbehave (?:as|like)\b", r"\bimagine (?:you|that you|being)\b", r"\bimpersonat", r"\bjail ?break", r"\bplay the (?:role|part)\b", r"\byour (?:role|task|job|name|persona|character) (?:is|will be)\b", r"\bbe my\b", r"\bspeak (?:as|like)\b", r"\banswer as (?:if|a|an|though|my)\b",
    r"\bdo anything now\b", r"\b(?:developer|debug|admin|god|maintenance|sudo|root|dan) mode\b", r"\bsudo\b", r"\bunrestricted\b", r"\buncensored\b", r"\bwithout (?:any )?(?:restriction|filter|rule|limit|censor)", r"\bhypothetical", r"\bno matter what\b", r"\balways (?:answer|say|reply|respond)\b", r"\b(?:only|just|simply) (?:say|reply|respond|output)\b",
    r"\b(?:say|reply|respond|output|print|write|answer)(?: with| only)* [\"'\u201c]", r"\b(?:system|assistant|user|human|ai|bot|instructions?|response|answer)\s?:", r"\bend of (?:prompt|instruction|question|input|context)", r"\bnew (?:instructions?|rules?|task)\b", r"\bprompt injection\b", r"\blanguage model\b", r"\bchat ?gpt\b", r"\b(?:drop table|import os|eval\(|exec\(|rm -rf)",
    r"\btranslate\b", r"\bwho (?:made|created|trained|programmed|built) you\b",
)  # fmt: skip

_DECLINED = (
    (_INJECTION, "The question tries to give the model other instructions; ask about what the image shows."),
    (_COMMAND, "This is a command. Nothing here moves an instrument or a camera; ask about what the image shows."),
    (_IDENTITY, "Questions about who somebody is are not answered; ask about what the image shows."),
    (_DIAGNOSIS, "Questions about disease and health are not answered; ask about instruments, actions and phase."),
    (_OUTCOME, "Questions about outcome, risk or anyone's skill are not answered; ask about what the image shows."),
    (_ADVICE, "Advice on what to do is not given; ask about what the image shows."),
)

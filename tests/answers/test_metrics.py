"""Each metric equals its library, or a value worked out by hand; in Chinese too."""

import jieba
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from slap_ds.answers import metrics
from slap_ds.answers.greedy import without_thought
from slap_ds.answers.metrics import (
    Answer,
    answer_tokens,
    distinct,
    exact_match,
    group_metrics,
    marked_number,
    rouge_l,
    said_number,
    sample_metrics,
    token_f1,
)
from slap_ds.answers.text import characters, language_of, needed, words_like

pytestmark = pytest.mark.lane


def scored(*answers: Answer):
    return group_metrics(answers, [sample_metrics(a) for a in answers])


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Hello there", "other"),
        ("这辆车很大。", "zh"),
        ("PyTorch 很好用", "other"),  # 3 of 10 letters are Han
        ("用 GPU 训练模型", "zh"),
        ("私は学生です", "ja"),
        ("Das Wort 大 heißt groß", "other"),
        ("42", "other"),
        ("", "other"),
    ],
)
def test_language_is_that_of_most_letters(text, language):
    assert language_of(text) == language


def test_squad_metrics_by_hand():
    assert exact_match("The cat.", "a CAT") == 1
    assert exact_match("the cats", "a cat") == 0
    assert answer_tokens("The  Eiffel-Tower, (in) Paris!") == ["eiffeltower", "in", "paris"]
    # found: big, dog, dog; wanted: dog, house. One in common: P 1/3, R 1/2, F 2/5.
    assert token_f1("the big dog, dog", "dog house") == pytest.approx(0.4)
    assert token_f1("", "the") == 0  # of which normalisation would leave nothing
    assert token_f1("", "cat") == 0


def test_squad_metrics_in_chinese_are_of_characters():
    assert answer_tokens("在北京，2008年！") == ["在", "北", "京", "2008", "年"]
    assert exact_match("北京。", "北京") == 1
    assert exact_match("北 京", "北京") == 1
    assert answer_tokens("巴黎Paris") == ["巴", "黎", "paris"]
    assert answer_tokens("使用GPT模型") == answer_tokens("使用 GPT 模型")
    assert token_f1("模型Transformer", "模型") == pytest.approx(2 * 2 / 5)
    assert answer_tokens("Transformer 5€の") == ["transformer", "5€", "の"]
    # 3 of 4 found characters among 5 wanted ones: 2 * 3 / 9.
    assert token_f1("在北京市", "北京市政府") == pytest.approx(2 * 3 / 9)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", 7),
        ("#### 1,234", 1234),
        ("costs $1,234.50.", 1234.5),
        ("from 16-3 to -5", -5),
        ("10, 20, 30.", 30),
        ("2-3", 3),
        ("#### $18 for 2", 18),
        ("The answer is...5", 5),
        ("is...-5", -5),
        ("The answer is .5", 0.5),
        ("costs $.50, no, -.25", -0.25),
        ("18.The answer is 18.", 18),
        ("the end.7", 7),
        ("(x,5)", 5),
        ("(3,5)", 5),
        ("1,234,567 of 5,10", 10),
        ("1,00,000", 100000),
        ("12,345.50", 12345.5),
        ("5 in version 1.2.3", 5),
        ("7 on 15.01.2024", 7),
        ("on 2024-01-15", 15),
        ("1.2.3", None),
        ("none", None),
        ("####", None),
    ],
)
def test_the_number_an_answer_says(text, number):
    assert said_number(text) == number


@pytest.mark.parametrize(
    ("reference", "number"),
    [
        ("3 + 4 = 7\n#### 7", 7),
        ("####-1,234.50. \n", -1234.5),
        ("#### $18", 18),
        ("#### Step 1", None),
        ("#### 1 First\nDo it 2 times", None),
        ("#### 3\n#### 4", 4),
        ("#### 1.2.3", None),
        ("#### 3,5", None),
        ("7", None),
    ],
)
def test_a_references_number_stands_at_its_end(reference, number):
    assert marked_number(reference) == number


def test_a_heading_is_no_number():
    answer = Answer("qa", ("#### Step 1\nBoil it.",), "#### Step 1\nBoil it.")
    assert sample_metrics(answer) == {"exact_match": 1.0, "f1": 1.0}


def test_number_match_takes_the_place_of_exact_match():
    rows = [
        Answer("qa", ("18", "16 - 3 = 13 ...\n#### 18"), "I think it is 18.00"),
        Answer("qa", ("5", "2 + 3\n#### 5"), "5 + 1 = 6"),
        Answer("qa", ("Paris", "Paris, in France"), "paris"),
    ]
    assert marked_number("no mark 3") is None
    found = scored(*rows)
    assert found["number_match"] == {"value": 0.5, "count": 2}
    assert found["exact_match"] == {"value": 1.0, "count": 1}
    assert found["f1"] == {"value": 1.0, "count": 1}


TRANSLATIONS = [
    ("这辆车很大。", "这辆汽车很大。"),
    ("我妹妹比我小。", "我的妹妹比我年轻。"),
    ("The car is very big.", "This car is very big."),
    ("My sister is young.", "My sister is younger than me."),
]


def test_bleu_and_chrf_are_sacrebleus_by_language_of_the_reference():
    rows = [Answer("translation", (r,), p) for p, r in TRANSLATIONS]
    found = scored(*rows)
    parts = found["bleu"]["by_tokenizer"]
    for tokens, pairs in (("zh", TRANSLATIONS[:2]), ("13a", TRANSLATIONS[2:])):
        said, wanted = zip(*pairs, strict=True)
        score = sacrebleu.corpus_bleu(said, [wanted], tokenize=tokens).score
        assert parts[tokens]["value"] == pytest.approx(score)
        assert parts[tokens]["count"] == 2
        assert f"tok:{tokens}" in parts[tokens]["signature"]
        assert sacrebleu.__version__ in parts[tokens]["signature"]
    assert found["bleu"]["value"] == pytest.approx(
        (parts["zh"]["value"] + parts["13a"]["value"]) / 2
    )
    said, wanted = zip(*TRANSLATIONS, strict=True)
    assert found["chrf"]["value"] == pytest.approx(sacrebleu.corpus_chrf(said, [wanted]).score)
    assert found["chrf"]["count"] == 4
    alone = sample_metrics(rows[3])
    assert alone["sentence_chrf"] == pytest.approx(
        sacrebleu.sentence_chrf(TRANSLATIONS[3][0], [TRANSLATIONS[3][1]]).score
    )
    assert alone["sentence_bleu"] == pytest.approx(
        sacrebleu.sentence_bleu(TRANSLATIONS[3][0], [TRANSLATIONS[3][1]]).score
    )


def test_several_references_are_all_used():
    rows = [
        Answer("translation", ("It is big.", "This is large."), "This is large."),
        Answer("translation", ("Good morning to you.",), "Good morning to you."),
    ]
    assert scored(*rows)["bleu"]["value"] == pytest.approx(100)
    assert scored(*rows)["chrf"]["value"] == pytest.approx(100)


def test_japanese_takes_mecab_only_where_there_is_one(monkeypatch):
    row = Answer("translation", ("私は学生です。",), "私は学生です。")
    for there, tokens in ((False, "13a"), (True, "ja-mecab")):
        monkeypatch.setattr(metrics, "_has_mecab", lambda there=there: there)
        assert metrics._bleu_tokens(row.references[0]) == tokens


def test_rouge_l_is_rouge_scores_in_english():
    said, wanted = "The quick brown fox don't jump!", "A quick fox didn't jump over the dog."
    library = rouge_scorer.RougeScorer(["rougeL"]).score(wanted, said)["rougeL"].fmeasure
    found = scored(Answer("dialogue", (wanted,), said))
    assert found["rouge_l"]["value"] == pytest.approx(library)
    assert 0 < library < 1
    assert "rouge_l_characters" not in found


def test_rouge_l_in_chinese_is_of_jiebas_words_and_of_characters():
    said, wanted = "我喜欢在北京大学学习。", "我在北京大学学习自然语言处理"
    words = [w for w in jieba.lcut(wanted) if w != "。"]
    assert "北京大学" in words

    def by_hand(a: list[str], b: list[str]) -> float:
        """F-measure of the longest common subsequence, by the textbook's table."""
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                best = max(table[i][j + 1], table[i + 1][j])
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else best
        return 2 * table[-1][-1] / (len(a) + len(b))

    found = scored(Answer("dialogue", (wanted,), said))
    said_words = [w for w in jieba.lcut(said) if w != "。"]
    assert found["rouge_l"]["value"] == pytest.approx(by_hand(said_words, words))
    by_characters = by_hand([*said.rstrip("。")], [*wanted])
    assert found["rouge_l_characters"]["value"] == pytest.approx(by_characters)
    # 我 在北京大学学习: 8 characters in common of 10 and 14.
    assert by_characters == pytest.approx(2 * 8 / 24)


def test_other_scripts_keep_their_letters():
    assert words_like("Где дом?")("Вот дом, да.") == ["вот", "дом", "да"]
    assert rouge_l("über Äpfel", "Äpfel über", words_like("Äpfel über")) == pytest.approx(0.5)
    assert words_like("की")("की, का कि") == ["की", "का", "कि"]
    assert rouge_l("का", "की", words_like("की")) == 0
    assert words_like("สวัสดี")("สวัสดี ครับ") == ["สวัสดี", "ครับ"]
    composed, apart = "Café Zoë", "Cafe\u0301 Zoe\u0308"
    assert words_like(composed)(apart) == words_like(apart)(composed) == ["café", "zoë"]
    assert exact_match(apart, composed) == rouge_l(apart, composed, words_like(apart)) == 1
    assert characters("か\u3099x\u0323y") == ["が", "x\u0323y"]
    assert characters("用GPU训练!") == ["用", "gpu", "训", "练"]


def test_distinct_by_hand():
    # a b a b: unigrams 2 of 4; with c: 3 of 5. bigrams ab ba ab: 2 of 3; c alone has none.
    texts = [["a", "b", "a", "b"], ["c"]]
    assert distinct(texts, 1) == pytest.approx(3 / 5)
    assert distinct(texts, 2) == pytest.approx(2 / 3)
    assert distinct([[]], 2) == 0
    rows = [Answer("general", ("我喜欢苹果",), "苹果苹果"), Answer("general", ("I do",), "I do")]
    # jieba: 苹果 苹果; English: i do.
    assert scored(*rows)["distinct_1"] == {"value": pytest.approx(3 / 4), "count": 2}
    assert scored(*rows)["distinct_2"]["value"] == 1


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("qa", {"exact_match", "f1"}),
        ("translation", {"bleu", "chrf"}),
        ("dialogue", {"rouge_l", "distinct_1", "distinct_2"}),
        ("general", {"rouge_l", "distinct_1", "distinct_2"}),
        ("summaries", {"rouge_l"}),
        ("", {"rouge_l"}),
    ],
)
def test_the_task_chooses_the_metrics(task, names):
    assert set(scored(Answer(task, ("a house",), "a house"))) == names


@pytest.mark.parametrize("task", ["qa", "translation", "dialogue", "other"])
def test_an_empty_answer_scores_zero(task):
    found = scored(Answer(task, ("a house",), ""))
    assert {entry["value"] for entry in found.values()} == {0}


def test_a_missing_library_is_named():
    with pytest.raises(ValueError, match=r"needs no_such_library: pip install 'slap_ds\[eval\]'"):
        needed("no_such_library.metrics")


@pytest.mark.parametrize("reference", ["A", "The", "+", "?", "the a", "。"])
def test_a_reference_that_normalises_to_nothing_is_compared_as_it_is(reference):
    for measure in (exact_match, token_f1):
        assert measure("", reference) == 0
        assert measure("another", reference) == 0
        assert measure(f" {reference.lower()} ", reference) == 1


def test_a_thought_is_no_part_of_an_answer():
    assert without_thought("\n<think>Paris? <b></think>\nParis. ") == "Paris."
    assert without_thought("</think>Paris.") == "Paris."
    assert without_thought(" 2 < 3 ") == "2 < 3"
    assert without_thought("<think>it never ends") == "<think>it never ends"

"""The chat page in a real browser: it says what the CLI says, and everything on it works."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.bundled import MODEL
from support.chat_page import NO_GPU, ChatPage, serving

GREEDY = {"temperature": 0}
TALKS = [
    ["Tell me a story about a dog.", "What do you like to do for fun?", "Do you have any pets?"],
    ["Hi! How are you?", "I went to the park with my mom.", "Was it — fun? 🐶 Ünïcödé\ttoo"],
]
STORY = "Tell me a story about a boat and a storm."

Visit = Callable[..., Any]


def cli(model: Path, turns: list[str], *options: str) -> str:
    """What `fbiedge chat` answers in a pipe."""
    command = [sys.executable, "-m", "fbiedge.cli", "chat", str(model), "--temperature", "0", *options]
    return subprocess.run(command, input="\n".join(turns), capture_output=True, text=True, check=True).stdout


def as_in_a_pipe(answers: list[str]) -> str:
    return "".join(answer if answer.endswith("\n") else answer + "\n" for answer in answers)


@pytest.fixture(scope="module")
def visited(visit: Visit, light: Path) -> Iterator[Any]:
    page = visit(light, settings=GREEDY, viewport={"width": 1280, "height": 800}).ready()
    yield page
    page.close()


@pytest.fixture
def chat(visited: Any) -> Iterator[Any]:
    """A new greedy chat with the model that is quick in a browser."""
    visited.page.click("#new-chat")
    yield visited
    visited.set(**{"Longest answer": 0, "Temperature": 0})


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bundled_model_as_it_is_answers_as_the_cli_does(threads: int, visit: Visit) -> None:
    """As the CLI with fp32 activations: onnxruntime-web's MatMulNBits rounds none, whatever level the file asks for."""
    page = visit(MODEL, settings={**GREEDY, "threads": threads, "maxTokens": 48}).ready()
    assert f"WebAssembly, {threads} thread" in page.page.inner_text("#engine")
    turns = TALKS[threads - 1]
    assert as_in_a_pipe([page.ask(turn) for turn in turns]) == cli(
        MODEL, turns, "--accuracy-level", "fp32", "--max-tokens", "48"
    )
    page.close()


def test_conversations_in_stock_operators_answer_as_the_cli_does(chat: Any, light: Path) -> None:
    for turns in TALKS:
        assert as_in_a_pipe([chat.ask(turn) for turn in turns]) == cli(light, turns)
        chat.page.click("#new-chat")


def test_a_full_context_forgets_the_oldest_turns_as_the_cli_does(chat: Any, light: Path) -> None:
    turns = [f"Tell me a story about a {animal}." for animal in ("dog", "cat", "bird", "fox")]
    said = [(chat.ask(turn), chat.about) for turn in turns]
    assert as_in_a_pipe([answer for answer, _ in said]) == cli(light, turns)
    assert any("forgotten" in about for _, about in said)


def test_a_turn_runs_only_what_the_cache_lacks(chat: Any) -> None:
    chat.ask("Hi! How are you?")
    chat.ask("Do you have any pets?")
    prompt, cached = (int(word) for word in chat.details.replace(",", "").split() if word.isdigit())
    assert 0 < prompt - cached <= 16


def test_stop_keeps_what_was_written_and_the_conversation_goes_on(chat: Any) -> None:
    whole = chat.ask(STORY)
    chat.page.click("text=Regenerate")
    chat.wait("document.querySelector('.assistant .text').textContent.length > 20")
    chat.page.keyboard.press("Escape")
    part = chat.answer()
    assert "stopped" in chat.about and whole.startswith(part) and 20 < len(part) < len(whole)
    assert chat.ask("Do you have any pets?")
    assert chat.page.locator(".message").count() == 4


def test_a_model_that_does_not_stop_is_ended(chat: Any) -> None:
    said = chat.run(
        """async () => {
            const { Engine } = await import("/engine.js");
            const engine = new Engine(); // without a model, which never answers
            const later = window.setTimeout;
            window.setTimeout = (act) => later(act, 0);
            const asked = engine.ask("?", {}, () => {});
            engine.stop();
            window.setTimeout = later;
            return asked.catch((error) => [error.message, engine.worker === undefined]);
        }"""
    )
    assert said == ["The model did not stop.", True]


def test_regenerate_asks_the_same_again_in_the_same_place(chat: Any) -> None:
    chat.ask("Hi! How are you?")
    first = chat.ask("Do you have any pets?")
    chat.page.click("text=Regenerate")
    assert chat.answer() == first
    assert chat.page.locator(".message").count() == 4
    assert chat.page.locator("text=Regenerate").count() == 1, "only the last answer can be asked for again"


def test_the_longest_answer_is_kept_to(chat: Any) -> None:
    chat.set(**{"Longest answer": 5})
    chat.ask(STORY)
    assert "5 tokens" in chat.about and "cut" in chat.about


def test_sampling_differs_from_greedy_and_from_itself(chat: Any) -> None:
    chat.set(**{"Longest answer": 24})
    texts = {chat.ask(STORY)}
    chat.set(Temperature=2)
    for _ in range(2):
        chat.page.click("#new-chat")
        texts.add(chat.ask(STORY))
    assert len(texts) == 3


def test_text_is_never_html(chat: Any) -> None:
    """Neither the user's nor, through the same call that shows all of them, a model's."""
    chat.set(**{"Longest answer": 8})
    attack = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>&lt;b&gt;"
    chat.ask(attack)
    assert chat.page.locator(".user .text").text_content() == attack
    shown = chat.run(
        """async (text) => {
            const { AnswerView } = await import("/view.js");
            const view = new AnswerView();
            for (const character of text) view.append(character);
            view.about([text], [{ label: text, act: () => {} }], text);
            return [view.element.querySelectorAll("img, script, b").length, view.element.textContent];
        }""",
        attack,
    )
    assert shown == [0, attack * 3]
    assert chat.page.locator("#messages img, #messages script").count() == 0
    assert chat.page.title() == "light"


def test_the_keyboard_is_enough(chat: Any) -> None:
    page = chat.page
    assert page.evaluate("document.activeElement.id") == "input", "one can write at once"
    page.keyboard.type("Hi!")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("How are you?")
    page.keyboard.press("Enter")
    chat.answer()
    assert page.locator(".user .text").text_content() == "Hi!\nHow are you?"
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.textContent") == "Regenerate"
    page.keyboard.press("Enter")
    chat.answer()
    assert page.evaluate("document.activeElement.id") == "input", "the focus is not lost with the button that had it"
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    assert page.locator("dialog[open]").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert page.evaluate("document.activeElement.id") == "open-settings"


def test_everything_to_operate_has_a_name_and_answers_are_announced(chat: Any) -> None:
    page = chat.page
    answer = chat.ask("Do you have any pets?")
    chat.wait("(text) => document.querySelector('[role=status]').textContent.includes(text)", answer)
    assert page.get_by_role("log", name="Conversation").count() == 1
    page.click("#open-settings")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select, progress, dialog")].filter((one) => {
            const label = one.getAttribute("aria-label") || one.labels?.[0]?.textContent || one.textContent;
            return !one.getAttribute("aria-labelledby") && !label.trim() && one.id !== "notice-action";
        }).map((one) => one.outerHTML)"""
    )
    assert unnamed == []
    assert page.get_by_role("spinbutton", name="Temperature").count() == 1
    page.keyboard.press("Escape")


def test_settings_are_checked_kept_and_taken_back(visit: Visit, light: Path) -> None:
    chat = visit(light, settings={"system": "Be brief.", "of another version": 1}).ready()
    page = chat.page
    page.click("#open-settings")
    field = page.get_by_role("spinbutton", name="Top-p")
    assert field.input_value() == "0.9", "what the model recommends"
    for wrong in ("3", "-1", ""):
        field.fill(wrong)
        field.press("Tab")
        assert field.get_attribute("aria-invalid") == "true"
    field.fill("0.5")
    field.press("Tab")
    assert field.get_attribute("aria-invalid") == "false"
    page.get_by_role("button", name="Done").click()
    page.reload()
    chat.ready()
    page.click("#open-settings")
    assert field.input_value() == "0.5"
    page.click("text=Use the model's own")
    assert field.input_value() == "0.9"
    assert page.get_by_role("spinbutton", name="Temperature").input_value() == "0.7"
    assert page.get_by_role("textbox", name="System prompt").count() == 0, "this model's template takes none"
    page.keyboard.press("Escape")
    assert chat.ask("Hi! How are you?"), "a system prompt that was kept for another model is left out"
    chat.close()


def test_a_model_that_is_loaded_again_forgets_the_answer_that_was_being_written(visit: Visit, light: Path) -> None:
    chat = visit(light, settings={**GREEDY, "threads": 1}).ready()
    page = chat.page
    whole = chat.ask(STORY)
    page.click("text=Regenerate")
    held: list[Any] = []
    page.route("**/model.json", lambda route: held.append(route), times=1)
    chat.set(Threads=2)
    page.wait_for_selector("text=Loading the model")
    page.wait_for_timeout(300)  # in which the old answer ends
    assert page.is_disabled("#new-chat"), "nothing can be asked before the model is there"
    held[0].continue_()
    chat.ready()
    assert page.inner_text("#engine").endswith("2 threads")
    assert page.locator(".message").count() == 0
    assert chat.ask(STORY) == whole
    chat.close()


def test_it_fits_a_desktop(chat: Any) -> None:
    fits(chat, 1280, 800)


def test_it_fits_phones(visit: Visit, light: Path) -> None:
    phone = visit(
        light, settings=GREEDY, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True
    ).ready()
    fits(phone, 390, 844)
    phone.page.set_viewport_size({"width": 320, "height": 568})
    phone.page.click("#new-chat")
    fits(phone, 320, 568)
    phone.close()


def test_a_phone_is_let_in_without_gpu_and_threads(
    chromium: Callable[[list[str]], Any], libraries: dict[str, Path], light: Path
) -> None:
    """By the address that other devices know this machine by. No browser trusts it, for want of HTTPS."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect(("198.51.100.1", 9))  # an address for examples; nothing is sent
        except OSError:
            pytest.skip("this machine has no network")
        address = route.getsockname()[0]
    browser = chromium([*NO_GPU, f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {address}"])
    with serving(light, libraries, host="0.0.0.0") as url:
        phone = ChatPage(browser, url.replace("localhost", address), settings=GREEDY).ready()
        assert phone.page.inner_text("#engine") == "WebAssembly, 1 thread"
        assert "neither GPU nor threads" in phone.page.get_attribute("#engine", "title")
        assert phone.ask(TALKS[0][0]) + "\n" == cli(light, TALKS[0][:1])
        phone.errors.clear()  # the browser's own words about a header that it ignores
        phone.close()
    browser.close()


def fits(page: Any, width: int, height: int) -> None:
    page.set(**{"Longest answer": 8})
    page.ask("An-unbreakable-" + "word" * 60 + "\n" + "A line. " * 60)
    page.page.fill("#input", "line\n" * 40)
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.run("document.getElementById('scroll').scrollWidth <= document.getElementById('scroll').clientWidth")
    send = page.page.locator("#send").bounding_box()
    assert send["y"] + send["height"] <= height and send["x"] + send["width"] <= width
    assert min(send["width"], send["height"]) >= 44, "large enough for a thumb"
    assert page.page.locator("#messages").bounding_box()["width"] <= 44 * 16
    assert page.run("document.getElementById('scroll').clientHeight") >= height * 0.3, (
        "a long message leaves room for the conversation"
    )
    assert page.run("parseFloat(getComputedStyle(input).fontSize)") >= 16, "or phones zoom in"
    page.page.fill("#input", "")


def test_a_model_that_changes_or_goes_away_is_said_and_can_be_tried_again(
    visit: Visit, light: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model" / "model.onnx"
    model.parent.mkdir()
    whole = light.read_bytes()
    model.write_bytes(whole)
    page = visit(model, settings=GREEDY).ready()
    assert page.page.title() == "model", "named after its folder"
    model.write_bytes(whole[:-1])
    page.page.reload()
    page.page.wait_for_selector("text=model.onnx has changed since fbiedge started")
    model.unlink()
    page.page.click("text=Try again")
    page.page.wait_for_selector("text=model.onnx can't be loaded: 404")
    model.write_bytes(whole)
    page.page.click("text=Try again")
    page.ready()
    assert page.ask("Hi! How are you?")
    page.errors.clear()  # the browser's own words for the 404
    page.close()


def test_a_large_model_shows_its_way_and_may_have_external_data(visit: Visit, light: Path, tmp_path: Path) -> None:
    import onnx

    model = tmp_path / "large.onnx"
    onnx.save(onnx.load(light), model, save_as_external_data=True, location="large.onnx.data", size_threshold=256)
    page = visit(model, settings=GREEDY).ready()
    assert any(url.endswith("/model/large.onnx.data") for url in page.requests)
    assert page.ask("Do you have any pets?") + "\n" == cli(light, ["Do you have any pets?"])
    steps = page.run(
        """async () => {
            const { files } = await (await fetch("/model.json")).json();
            const steps = [];
            const { download } = await import("/download.js");
            const found = await download(files, (done, total) => steps.push([done, total]));
            return [steps, found.map((file) => file.data.length), files.map((file) => file.bytes)];
        }"""
    )
    sizes = [model.stat().st_size, (tmp_path / "large.onnx.data").stat().st_size]
    assert steps[1] == steps[2] == sizes
    assert [done for done, _ in steps[0]] == sorted({done for done, _ in steps[0]}) and steps[0][-1] == [sum(sizes)] * 2
    page.close()

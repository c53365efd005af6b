"""The page's list of requests in headless Chromium, and what a reload or a restart leaves of it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.api.test_metadata import DrawingHost
from tests.chromium import fill, needs_chromium, no_sideways_scroll
from tests.http.test_web_tools import DESK, PHONE, file, make, png
from tests.httphost import FakeHost, config_of, wait_for

pytestmark = needs_chromium
ASYNC = {"Prefer": "respond-async"}


@pytest.fixture
def host() -> Iterator[FakeHost]:
    with DrawingHost(config_of(width=64, height=64)) as host:
        yield host


def begin(page: Page, host: FakeHost, prompt: str = "hold", **values: Any) -> None:
    """Ask for a picture, which forms until `go_on`."""
    before = len(host.seen)
    fill(page, **{"positive": prompt, "steps": 2} | values)
    page.locator("#generate").click()
    wait_for(lambda: len(host.seen) > before)


def note(dialog: Any, asked: list[str]) -> None:
    asked.append(dialog.type)
    dialog.accept()


def row(page: Page, title: str, part: str = "mine") -> Any:
    return page.locator(f"#{part} li", has=page.get_by_text(title, exact=True))


def kept(page: Page, place: str = "jobs") -> Any:
    """What the browser keeps there: [id, ...]."""
    return page.evaluate(
        """(place) => new Promise((resolve) => {
            const request = indexedDB.open("multigpu-diffusion");
            request.onsuccess = () => {
                const keys = request.result.transaction(place).objectStore(place).getAllKeys();
                keys.onsuccess = () => { request.result.close(); resolve(keys.result); };
            };
        })""",
        place,
    )


def test_a_reload_in_the_middle_loses_nothing(host: FakeHost, tabs: Any) -> None:
    page = tabs(host.url, **PHONE)
    asked: list[str] = []
    page.on("dialog", lambda dialog: note(dialog, asked))
    page.locator("#image").set_input_files([file("start.png", png((64, 64)))])
    begin(page, host, seed=3)
    for prompt in ("second", "third", "fourth"):
        fill(page, positive=prompt)
        page.locator("#generate").click()
    expect(row(page, "second")).to_contain_text("Queued, 1 ahead")
    expect(row(page, "fourth")).to_contain_text("Not sent yet")
    page.reload()
    expect(page.locator("#status")).to_have_text("Found again: 4 requests")
    expect(page.locator("#doing")).to_have_text(re.compile("Step"))
    expect(page.locator("#mine .title")).to_have_text(["hold", "second", "third", "fourth"])
    expect(row(page, "hold")).to_contain_text("Drawing, ")
    assert asked == [] and no_sideways_scroll(page)
    host.go_on.set()
    expect(page.locator("#history li")).to_have_count(4)
    expect(page.locator("#running")).to_be_hidden()
    assert [one.positive for one in host.seen] == ["hold", "second", "third", "fourth"]
    assert all(one.image == png((64, 64)) for one in host.seen)
    expect(page.locator("#mine .title")).to_have_text(["fourth", "third", "second", "hold"])
    page.locator("#history button").last.click()
    page.get_by_role("button", name="Use these settings", exact=True).click()
    expect(page.locator("#positive")).to_have_value("hold")
    expect(page.locator("#image-chosen")).to_contain_text("start.png")


def test_requests_reach_the_host_in_their_order(host: FakeHost, tabs: Any) -> None:
    page = tabs(host.url)
    first: list[Any] = []
    page.route("**/generate", lambda route: route.continue_() if first else first.append(route))
    for prompt in ("first", "second"):
        fill(page, positive=prompt, steps=1)
        page.locator("#generate").click()
    page.wait_for_timeout(700)  # the first is long on its way
    first[0].continue_()
    expect(page.locator("#history li")).to_have_count(2)
    assert [one.positive for one in host.seen] == ["first", "second"]


def test_what_was_done_while_the_page_was_away_is_found(host: FakeHost, tabs: Any) -> None:
    page = tabs(host.url)
    begin(page, host, seed=8)
    page.goto("about:blank")
    host.go_on.set()
    wait_for(lambda: host.get("/jobs").json()["jobs"][0]["state"] == "done")
    page.goto(host.url)
    expect(page.locator("#status")).to_have_text("Done.")
    expect(page.locator("#facts")).to_contain_text("Seed 8 ")
    expect(page.locator("#history li")).to_have_count(1)
    page.reload()  # it is in the history, and waited for no more
    expect(row(page, "hold")).to_contain_text("Done at ")
    expect(page.locator("#status")).to_be_empty()
    assert len(host.seen) == 1
    expect(page.locator("#history li")).to_have_count(1)


def test_a_request_that_was_on_its_way_is_sent_once_more_and_made_once(host: FakeHost, tabs: Any) -> None:
    page = tabs(host.url)
    page.route("**/generate", lambda route: None)  # the host's answer never comes
    fill(page, positive="on its way", steps=1, seed=4)
    page.locator("#generate").click()
    wait_for(lambda: kept(page))
    [id] = kept(page)
    page.goto("about:blank")
    page.unroute("**/generate")
    assert host.get("/jobs").json()["jobs"] == []
    page.goto(host.url)
    expect(page.locator("#facts")).to_contain_text("Seed 4 ")
    [job] = host.get("/jobs").json()["jobs"]
    assert job["id"] == id and len(host.seen) == 1
    # The same where the host had taken it: the entry is as it was before the answer 202.
    page.evaluate(
        """(id) => new Promise((resolve) => {
            const request = indexedDB.open("multigpu-diffusion");
            request.onsuccess = () => {
                const jobs = request.result.transaction("jobs", "readwrite").objectStore("jobs");
                jobs.get(id).onsuccess = ({ target }) => {
                    jobs.put({ ...target.result, isAccepted: false, isOver: false }).onsuccess = resolve;
                };
            };
        })""",
        id,
    )
    page.reload()
    expect(page.locator("#status")).to_have_text("Done.")
    assert len(host.seen) == 1
    expect(page.locator("#history li")).to_have_count(1)


def test_a_restart_and_a_reload_find_the_same_picture(tabs: Any, tmp_path: Path) -> None:
    first = FakeHost(config_of(state_dir=str(tmp_path / "state")))
    page = tabs(first.url)
    begin(page, first)
    expect(page.locator("#doing")).to_have_text(re.compile("Step"))
    first.die()
    page.goto("about:blank")
    with FakeHost(replace(first.config, port=first.server.port), state="loading") as again:
        page.goto(first.url)
        expect(page.locator("#status")).to_have_text("Found again: hold")
        expect(row(page, "hold")).to_contain_text("Queued, next")
        fill(page, positive="after", steps=1)
        again.go_on.set()
        again.status.ready()
        expect(page.locator("#facts")).to_contain_text(f"Seed {first.seen[0].seed} ")
        assert len(again.seen) == 1


def test_an_unsent_request_waits_while_the_host_loads(tabs: Any) -> None:
    host = FakeHost()
    page = tabs(host.url)
    page.route("**/generate", lambda route: None)
    fill(page, positive="early", steps=1)
    page.locator("#generate").click()
    wait_for(lambda: kept(page))
    page.goto("about:blank")
    page.unroute("**/generate")
    host.close()
    with FakeHost(replace(host.config, port=host.server.port), state="loading") as again:
        with page.expect_response("**/generate") as refused:
            page.goto(host.url)
        assert refused.value.status == 503
        expect(row(page, "early")).to_contain_text("Not sent yet")
        again.status.ready()
        expect(page.locator("#status")).to_have_text("Done.")
        assert len(again.seen) == 1


def test_a_request_that_the_host_has_lost_is_told_and_asked_for_again(tabs: Any) -> None:
    host = FakeHost(config_of(width=64, height=64))  # in memory only
    page = tabs(host.url)
    page.locator("#image").set_input_files([file("start.png", png((64, 64)))])
    begin(page, host, cfg=3)
    expect(page.locator("#doing")).to_have_text(re.compile("Step"))  # the host's 202 has come
    page.goto("about:blank")
    host.die()
    with FakeHost(replace(host.config, port=host.server.port)) as again:
        again.go_on.set()
        page.goto(host.url)
        told = "The host no longer has this request. Send it again?"
        expect(page.locator("#error")).to_have_text(f"hold: {told}")
        expect(row(page, "hold")).to_contain_text(told)
        expect(page.locator("#running")).to_be_hidden()
        page.reload()
        expect(row(page, "hold")).to_contain_text(told)
        page.get_by_role("button", name="Use these settings: hold").click()
        expect(page.locator("#positive")).to_have_value("hold")
        expect(page.locator("#cfg")).to_have_value("3")
        expect(page.locator("#image-chosen")).to_contain_text("start.png")
        page.get_by_role("button", name="Send again: hold").press("Enter")
        expect(page.locator("#status")).to_have_text("Done.")
        [made] = again.seen
        assert made.image == png((64, 64)) and made.cfg == 3
        expect(page.locator("#mine li")).to_have_count(1)
        expect(row(page, "hold")).to_contain_text("Done at ")


def test_a_host_that_stops_without_a_folder_fails_what_waits_in_words(tabs: Any) -> None:
    host = FakeHost()
    page = tabs(host.url)
    begin(page, host)
    expect(page.locator("#doing")).to_have_text(re.compile("Step"))
    host.close()
    with FakeHost(replace(host.config, port=host.server.port)) as again:
        again.go_on.set()
        expect(page.locator("#state")).to_have_text("ready")
        # "The host is stopping." where it could still say so, else that it no longer has it.
        expect(row(page, "hold")).to_contain_text(re.compile(r"The host .*\. Send it again\?"))
        page.get_by_role("button", name="Send again: hold").click()
        expect(page.locator("#facts")).to_be_visible()
        assert len(again.seen) == 1


def test_others_and_ones_own_and_their_ends(host: FakeHost, tabs: Any) -> None:
    page, phone = tabs(host.url, **DESK), tabs(host.url, **PHONE)
    begin(page, host)
    other = "<b>another's</b>"
    assert host.generate({"positive": other, "pictures": 2}, headers=ASYNC).status_code == 202
    fill(page, positive="mine too")
    page.locator("#generate").click()
    expect(row(page, other, "others")).to_contain_text("Queued, 1 ahead")
    expect(row(page, other, "others").get_by_role("button")).to_have_count(0)
    expect(page.locator("#mine .title")).to_have_text(["hold", "mine too"])
    expect(phone.locator("#others .title")).to_have_count(3)
    expect(phone.locator("#mine-title")).to_be_hidden()
    assert no_sideways_scroll(phone)
    page.reload()
    page.get_by_role("button", name="Cancel: mine too").press("Enter")
    expect(row(page, "mine too")).to_contain_text("Cancelled at ")
    expect(page.locator("#others b")).to_have_count(0)
    fill(page, positive="fail", steps=3)
    page.locator("#generate").click()
    host.go_on.set()
    expect(row(page, "fail")).to_contain_text("Failed: rank 1: out of memory")
    expect(row(page, "hold")).to_contain_text("Done at ")
    expect(row(page, other, "others")).to_contain_text(re.compile("Done at .*, 2 pictures"))
    page.reload()
    page.get_by_role("button", name="Use these settings: fail").click()
    expect(page.locator("#steps")).to_have_value("3")
    page.get_by_role("button", name="Show: hold").click()
    expect(page.locator("#shown img")).to_have_attribute("alt", "hold")
    page.get_by_role("button", name="Forget: mine too").press("Enter")
    expect(row(page, "mine too")).to_have_count(0)
    expect(page.get_by_role("button", name="Show: hold")).to_be_focused()
    assert {job["prompt"] for job in host.get("/jobs").json()["jobs"]} == {other, "hold", "fail"}
    assert len(kept(page)) == 2


def test_a_picture_that_left_the_history_is_shown_from_the_host(host: FakeHost, tabs: Any) -> None:
    page = tabs(host.url)
    make(page, positive="once", steps=1, seed=6)
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#history-card")).to_be_hidden()
    page.get_by_role("button", name="Show: once").click()
    expect(page.locator("#facts")).to_contain_text("Seed 6 ")
    expect(page.locator("#history li")).to_have_count(1)
    assert len(host.seen) == 1
    host.store.forget(host.store.all()[0])
    make(page, positive="twice", steps=1)
    expect(row(page, "once")).to_have_count(0)  # the host has forgotten it, and so has the page
    expect(page.locator("#history li")).to_have_count(2)
    wait_for(lambda: len(kept(page)) == 1)


def test_two_tabs_of_one_browser_have_the_same_requests(host: FakeHost, tabs: Any) -> None:
    page = tabs(host.url)
    begin(page, host)
    second = page.context.new_page()
    second.goto(host.url)
    expect(second.locator("#status")).to_have_text("Found again: hold")
    fill(second, positive="by the second", steps=1)
    second.locator("#generate").click()
    page.bring_to_front()
    expect(page.locator("#mine .title")).to_have_text(["hold", "by the second"])
    page.get_by_role("button", name="Cancel: by the second").click()
    expect(row(second, "by the second")).to_contain_text("Cancelled at ")
    host.go_on.set()
    expect(page.locator("#status")).to_have_text("Done.")
    expect(second.locator("#history li")).to_have_count(1)
    expect(page.locator("#history li")).to_have_count(1)
    assert len(host.seen) == 1 and len(kept(page, "requests")) == 1


def test_the_list_is_read_only_when_something_has_changed(host: FakeHost, tabs: Any) -> None:
    page = tabs(host.url)
    read: list[str] = []
    page.on("request", lambda asked: read.append(asked.url) if "/jobs?" in asked.url else None)
    make(page, positive="slow", steps=3)  # from here on a step's seconds are known
    host.step_seconds = 0.1
    fill(page, steps=50)
    page.locator("#generate").click()
    drawn = row(page, "slow").first
    expect(drawn).to_contain_text(re.compile(r"Drawing, \d+ %, about \d+ s left"))
    expect(drawn).to_contain_text(re.compile(r"Drawing, [4-9]\d %"))
    before = len(read)
    expect(drawn).to_contain_text(re.compile(r"Drawing, [89]\d %"))
    assert len(read) == before <= 8, "seconds of progress are read from the events"
    expect(drawn).to_contain_text("Done at ")
    page.wait_for_timeout(1500)
    before = len(read)
    page.wait_for_timeout(2500)
    assert len(read) == before <= 12


def test_the_places_of_an_older_page_are_taken_over(host: FakeHost, tabs: Any) -> None:
    """Version 1 had the history alone."""
    page = tabs(f"{host.url}/web/icon.svg")
    page.evaluate(
        """(base64) => new Promise((resolve, reject) => {
            const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
            const pictures = [{ file: new Blob([bytes], { type: "image/png" }), seed: 41 }];
            const record = {
                id: "older-01", at: 1, type: "sd1", body: { positive: "older" }, inputs: {}, pictures,
                count: 1, warnings: [], steps: 2, width: 64, height: 64, seconds: { total: 1, denoise: 1 },
                format: "png",
            };
            const request = indexedDB.open("multigpu-diffusion", 1);
            request.onupgradeneeded = () => request.result.createObjectStore("requests", { keyPath: "id" });
            request.onsuccess = () => {
                window.older = request.result;
                const transaction = older.transaction("requests", "readwrite");
                transaction.objectStore("requests").put(record);
                transaction.oncomplete = resolve;
                transaction.onabort = reject;
            };
        })""",
        base64.b64encode(png()).decode(),
    )
    blocked = page.context.new_page()  # the older page is still open and holds its places
    blocked.goto(host.url)
    expect(blocked.locator("#history-note")).to_contain_text("An older version of this page is open")
    make(blocked, positive="meanwhile", steps=1)
    blocked.close()
    page.goto(host.url)
    expect(page.locator("#history button")).to_have_text(["Seed 41"])
    make(page, positive="newer", steps=1, seed=42)
    assert len(kept(page)) == 1
    page.reload()
    expect(page.locator("#history button")).to_have_text(["Seed 42", "Seed 41"])
    expect(row(page, "newer")).to_contain_text("Done at ")


def test_only_what_this_browser_cannot_keep_is_asked_about(host: FakeHost, tabs: Any) -> None:
    page = tabs(host.url)
    asked: list[str] = []
    page.on("dialog", lambda dialog: note(dialog, asked))
    begin(page, host)
    page.reload()
    expect(page.locator("#status")).to_have_text("Found again: hold")
    assert asked == []
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator("#status")).to_have_text("Cancelled.")
    page.add_init_script("Object.defineProperty(window, 'indexedDB', { value: undefined })")
    page.reload()
    begin(page, host)
    page.reload()
    assert asked == ["beforeunload"]
    host.go_on.set()

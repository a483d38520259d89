// The conversation on the page. Text of users and models only ever becomes text nodes, never HTML.

const NEAR_END = 48; // pixels from the end that still count as being there

/** Messages in a list that follows its end, as long as nobody has scrolled up. */
export class ConversationView {
  /**
   * @param {HTMLElement} list
   * @param {HTMLElement} scroller
   * @param {HTMLElement} toEnd  the button that goes to the end
   */
  constructor(list, scroller, toEnd) {
    this.list = list;
    this.scroller = scroller;
    this.follows = true;
    scroller.addEventListener("scroll", () => {
      const below = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
      this.follows = below < NEAR_END;
      toEnd.hidden = this.follows;
    });
    toEnd.addEventListener("click", () => this.showEnd());
    new ResizeObserver(() => this.follow()).observe(scroller); // a keyboard comes up, a window is made smaller
    new ResizeObserver(() => this.follow()).observe(list);
  }

  /** @param {string} text */
  addUser(text) {
    const message = element("article", "message user");
    message.setAttribute("aria-label", "You");
    message.append(element("p", "text", text));
    this.list.append(message);
    this.showEnd();
    return message;
  }

  addAnswer() {
    const answer = new AnswerView();
    this.list.append(answer.element);
    this.showEnd();
    return answer;
  }

  clear() {
    this.list.replaceChildren();
    this.showEnd();
  }

  follow() {
    if (this.follows) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  showEnd() {
    this.follows = true;
    this.follow();
  }
}

/** An answer that grows, and a line about it. */
export class AnswerView {
  constructor() {
    this.element = element("article", "message assistant writing");
    this.element.setAttribute("aria-label", "Model");
    this.paragraph = element("p", "text");
    this.node = document.createTextNode("");
    this.paragraph.append(this.node);
    this.line = element("div", "about numbers");
    this.element.append(this.paragraph, this.line);
  }

  get text() {
    return this.node.data;
  }

  /** @param {string} text */
  append(text) {
    this.node.appendData(text);
  }

  /**
   * @param {string[]} facts
   * @param {{label: string, act: () => void}[]} [actions]
   * @param {string} [more]  for who points at the line
   */
  about(facts, actions = [], more = "") {
    this.line.title = more;
    this.line.replaceChildren(
      ...facts.map((fact) => element("span", "", fact)),
      ...actions.map(({ label, act }) => {
        const button = element("button", "", label);
        button.setAttribute("type", "button");
        button.addEventListener("click", act);
        return button;
      }),
    );
  }

  finish() {
    this.element.classList.remove("writing");
  }
}

/**
 * @param {string} tag
 * @param {string} classes
 * @param {string} [text]
 */
function element(tag, classes, text) {
  const made = document.createElement(tag);
  made.className = classes;
  if (text !== undefined) made.textContent = text;
  return made;
}

# ruff: noqa: E501, RUF001
r"""Golds, and completions with the reward that each should get, by kind. Written for this test, taken from no dataset.

`BOXED` has, for each gold, what stands in the completion's `\boxed{}`: right answers, then wrong ones. `TEXTS` has whole
completions. Where a notation has several readings, the comment of its kind says which is meant. `UNMET` has what is
graded wrongly.

`python -m tests.tasks.grading_table` counts how many of them TRL's `accuracy_reward` grades rightly.
"""

BOXED: dict[str, list[tuple[object, list[str], list[str]]]] = {
    "integers": [
        ("12", ["１２", "١٢", "1\u200b2", "\ufeff12", "12\u2060"], ["１３", "١٣", "1\u200b3"]),
        ("42", ["42", "42.0", "042", "+42", " 42 ", r"\mathbf{42}", "{42}", r"\displaystyle 42"], ["-42", "24", "4.2", "421"]),
        ("-7", ["-7", r"\text{-}7", "−7", "-7.", "(-7)", "- 7"], ["7", "-77", "-0.7"]),
        ("0", ["0", "0.0", "-0", r"\frac{0}{5}"], ["1", r"\emptyset", "O"]),
        (17, ["17", r"\text{17}", r"\textbf{17}"], ["71", "1.7"]),
        ("007", ["7"], ["70"]),
    ],
    "fractions": [
        (
            r"\frac{3}{4}",
            ["3/4", r"\frac34", r"\dfrac{3}{4}", r"\tfrac34", r"\cfrac{3}{4}", "0.75", r"\frac{6}{8}", r"\frac 3 4", r"\frac{3}4",
             r"\frac3{4}", r"{3 \over 4}", r"75\%", "3 / 4", r"\left(\frac{3}{4}\right)", "¾", r"1-\frac14"],
            [r"\frac{4}{3}", r"\frac{3}{5}", "34", r"-\frac{3}{4}", "0.7", "3:5"],
        ),
        (r"\frac14", [r"\frac{1}{4}", r"\frac14", "0.25", "1/4"], ["4", "14", r"\frac{1}{14}", r"\frac41"]),
        ("-5/6", [r"-\frac{5}{6}", r"\frac{-5}{6}", r"\frac{5}{-6}", "-5/6", r"-\dfrac56"], [r"\frac{5}{6}", "-0.8"]),
        (r"\frac1{12}", [r"\frac{1}{12}", "1/12", r"\frac1{12}"], [r"\frac{1}{2}", "12", r"\frac12 \cdot 2"]),
        (r"\frac123", [r"\frac32", "1.5"], [r"\frac{1}{23}", r"\frac{12}{3}"]),  # TeX takes one digit each: 1/2 times 3
        ("22/7", [r"\frac{22}{7}", r"3\frac17", r"3\frac{1}{7}"], [r"\pi", "3.14", "3.17"]),
        (r"\frac{\pi}2", [r"\frac{\pi}{2}", r"\frac\pi2", r"\pi/2", "π/2", r"0.5\pi", "pi/2"], [r"\pi", "2", r"2\pi"]),
        (r"\frac{a+b}{2}", [r"\frac{a+b}2", "(a+b)/2", r"\frac{1}{2}(a+b)", r"\frac a2+\frac b2"], ["a+b/2", r"\frac{a-b}{2}"]),
    ],
    "decimals": [
        ("0.5", ["0.5", ".5", r"\frac12", "0.50", "1/2", r"50\%"], ["5", "0.05", "0.51"]),
        ("3.14", ["3.14", "3.140", r"\frac{157}{50}"], [r"\pi", "3.1", "314", "3.15"]),
        ("-0.125", ["-0.125", "-.125", r"-\frac18"], ["0.125", "-0.12"]),
        (r"0.\overline{3}", [r"\frac13", "1/3", r"0.\overline{3}", r"0.\bar{3}", r"0.\overline{33}"], ["0.3", r"0.\overline{4}", "3"]),
        (r"\frac{5}{6}", [r"0.8\overline{3}", r"0.8\bar3"], [r"0.\overline{83}", "0.83"]),
        ("0.0000001", ["0.0000001", r"10^{-7}", r"1 \times 10^{-7}"], ["0.0000002", "0", "0.00000014"]),
    ],
    "percent": [  # the sign may be missing, as a unit may; with it, the value is the hundredth too
        (r"50\%", [r"50\%", "50%", r"50 \%", r"50 \text{ percent}", "50 percent", "50", r"\frac12", "0.5"], [r"5\%", "0.05", r"0.5\%", r"500\%"]),
        ("12.5%", [r"12.5\%", "0.125", "12.5", r"\frac18"], [r"1.25\%", r"12\%", "125"]),
        ("30 percent", [r"30\%", "30", r"30\text{ percent}"], ["3", r"33\%", "30 cm", r"30^\circ", r"\$30"]),
        ("150\\%", [r"150\%", "1.5"], ["15", r"15\%"]),
        (r"33\frac{1}{3}\%", [r"33\frac13\%", r"\frac{100}{3}\%", r"33\frac{1}{3}"], [r"33\%", r"3\frac{1}{3}\%"]),
    ],
    "money": [
        (r"\$18.90", [r"\$18.90", "18.90", "18.9", r"\$ 18.90", "$18.90", r"18.90\text{ dollars}", "18.90 dollars"], ["1890", r"\$18.09", "18", "19.80"]),
        ("$5", ["5", r"\$5", "$5", r"\$5.00", "5 dollars", r"\text{\$}5", r"5\$", r"US\$5"], ["50", r"\$0.05", "-5", "5 cents", "5¢", "€5", r"5\%", r"\yen5"]),
        (r"\$1,250", ["1250", r"\$1250", r"\$1{,}250", "1,250", r"1250 \text{ USD}"], ["1.25", r"\$1,205", "125"]),
        ("€40", ["40", "€40", r"40 \text{ euros}", "40 €", r"\euro 40"], ["4", "€400", "£40", r"\$40", "40 dollars"]),
        ("£3.50", ["3.5", "£3.50", r"\pounds 3.50"], ["35"]),
        ("75 cents", ["75", r"75\text{ cents}", "75¢"], ["7.5", r"\$75"]),
        ("-$5", ["-5", r"-\$5", "-$5"], [r"\$5", "-€5"]),
        ("£5 ", ["5 pounds"], ["5 euros"]),
    ],
    "units": [  # units may be missing; where both have one, it is the same
        (
            "24 cm^2",
            ["24", r"24\text{ cm}^2", r"24 \, \mathrm{cm}^2", r"24 \mathrm{cm^2}", "24 cm^2", r"24\ \text{cm}^{2}", "24 cm²", r"24 \text{ square centimeters}",
             "24 sq cm", r"24\,\text{cm}^{2}."],
            ["42", "24^2", "2", "576", r"24 \text{ m}^2", r"24 \text{ cm}"],
        ),
        ("180 (days)", ["180", r"180 \text{ days}", "180 days", r"180\text{ (days)}"], ["18", "179 days"]),
        ("5 m", ["5", r"5\text{ m}", r"5\,\mathrm{m}", "5 m", "5 meters"], ["50", r"5 \text{ km}", "5m^2"]),
        ("12 apples", ["12", r"12\text{ apples}"], ["21"]),
        (r"60\text{ km/h}", ["60", r"60 \text{ km/h}", "60 km/h", r"60\,\mathrm{km/h}", r"60\frac{\text{km}}{\text{h}}"], ["6", "61"]),
        (r"9.8\ \mathrm{m/s^2}", ["9.8", r"9.8 \text{ m/s}^2"], ["98"]),
        (r"4\sqrt{2}\text{ cm}", [r"4\sqrt{2}", r"4\sqrt2 \text{ cm}", r"\sqrt{32}"], [r"4\sqrt{3}", "4"]),
        (r"\frac{1}{2} \text{ hour}", [r"\frac12", "0.5", r"\frac{1}{2}\text{ h}"], ["2"]),
        ("3 million", ["3000000", "3,000,000", r"3 \text{ million}", r"3 \times 10^6"], ["3", "300000"]),
        ("15 minutes", ["15", "15 min", r"15 \text{ minutes}"], [r"15 \text{ hours}", "1.5"]),
    ],
    "degrees": [  # the sign may be missing; with it, the value in radians is the same angle
        ("30°", ["30", r"30^\circ", r"30^{\circ}", "30°", "30 degrees", r"30\text{ degrees}", r"30 \degree", r"\frac{\pi}{6}"], ["60", "3", r"30^0", r"\frac{\pi}{3}", r"30^2"]),
        (r"90^\circ", ["90", r"90^{\circ}", r"90^\circ.", r"\pi/2"], ["9", r"80^\circ"]),
        (r"\frac{\pi}{4}", [r"\pi/4", r"45^\circ", r"0.25\pi"], ["45", r"\frac{\pi}{2}", r"54^\circ"]),
        ("22.5°", [r"22.5^\circ", "22.5", r"\frac{45}{2}^\circ"], ["225"]),
        (r"37^\circ\text{C}", ["37", r"37^\circ \text{C}", "37°C", "37 °C"], ["73"]),
    ],
    "intervals": [  # (a, b) may be a point as well as an interval
        ("[0,1)", ["[0,1)", "[0, 1)", r"\left[0,1\right)", r"0 \le x < 1", r"x \in [0,1)", r"[0,\frac{2}{2})"], ["[0,1]", "(0,1)", "(0,1]", "[0,2)", "0<x<1", "0", "1"]),
        (r"(-\infty, 2)", [r"(-\infty,2)", r"x<2", r"\left(-\infty, 2\right)", r"x \in (-\infty, 2)"], [r"(-\infty,2]", r"(2,\infty)", r"x \le 2", r"(-\infty, -2)"]),
        (r"[2,\infty)", [r"[2,\infty)", r"[2,+\infty)", r"x\ge 2", r"x \geq 2", r"x\geqslant 2"], [r"(2,\infty)", r"[2,3)", "x>2"]),
        (r"(-\infty,-1)\cup(1,\infty)", [r"(-\infty,-1)\cup(1,\infty)", r"(1,\infty) \cup (-\infty,-1)", r"(-\infty, -1) \cup (1, +\infty)"],
         [r"(-\infty,1)\cup(1,\infty)", r"(-1,1)", r"(-\infty,-1]\cup[1,\infty)", r"(-\infty,-1)"]),
        ("[-2,2]", ["[-2,2]", r"[-2, 2]", r"-2\le x\le 2", r"|x| \le 2"], ["(-2,2)", "[2,-2]", "[-2,3]"]),
        ("(0,1]", ["(0,1]", r"\left(0,1\right]", r"0<x\leq 1"], ["[0,1)", "(1,0]"]),
    ],
    "sets": [
        (r"\{1,2,3\}", [r"\{1,2,3\}", r"\{3,2,1\}", "1,2,3", r"\left\{1, 2, 3\right\}", r"\{1,2,3,3\}", "1, 2 and 3", r"\lbrace 1,2,3\rbrace"], [r"\{1,2\}", r"\{1,2,4\}", "(3,2,1)", "123", r"\{1,2,3,4\}", "6"]),
        (r"\emptyset", [r"\emptyset", r"\varnothing", r"\{\}", "∅"], ["0", r"\{0\}"]),
        (r"\mathbb{R}", [r"\mathbb{R}", r"(-\infty,\infty)", "ℝ", r"\mathbf{R}", r"\Bbb{R}"], [r"\mathbb{Q}", "0"]),
        (r"\mathbb{R}\setminus\{1\}", [r"\mathbb{R}\setminus\{1\}", r"(-\infty,1)\cup(1,\infty)"], [r"\mathbb{R}", r"\mathbb{R}\setminus\{2\}"]),
        (r"\{-1,0,1\}", [r"\{0,1,-1\}", "-1,0,1"], [r"\{0,1\}", r"\{1,0,1\}"]),
        (r"\{\frac12, \frac13\}", [r"\{\frac{1}{3},\frac{1}{2}\}", r"\{0.5, \frac13\}"], [r"\{\frac12\}", r"\{\frac12,\frac14\}"]),
    ],
    "tuples": [
        ("(1,2)", ["(1,2)", "(1, 2)", r"\left(1,2\right)", r"(x,y)=(1,2)", r"\left( 1, \frac{4}{2} \right)"], ["(2,1)", "(1,3)", "[1,2]", r"\{1,2\}", "12", "1"]),
        ("(3,-1)", ["(3,-1)", "(3, -1)", r"(x, y) = (3, -1)"], ["(-1,3)", "(3,1)", "(-3,1)"]),
        ("(1,2,3)", ["(1,2,3)", "(1, 2, 3)", r"\langle 1,2,3\rangle"], ["(3,2,1)", "(1,2)", "(1,2,3,4)", r"(1,3,2)"]),
        (r"\left( 3, \frac{\pi}{2} \right)", [r"(3,\pi/2)", r"(3, \frac\pi2)"], [r"(\frac{\pi}{2}, 3)", r"(3,\pi)"]),
        ("(1,2),(3,4)", ["(1,2),(3,4)", "(3,4), (1,2)", r"(1,2) \text{ and } (3,4)", r"\{(1,2),(3,4)\}"], ["(1,2)", "(2,1),(3,4)", "(1,4),(3,2)", "1,2,3,4"]),
        ("(a,b)", ["(a,b)", "(a, b)"], ["(b,a)", "ab"]),
    ],
    "matrices": [
        (
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
            [r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", r"\left(\begin{matrix}1&2\\3&4\end{matrix}\right)",
             r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", r"A=\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&\frac82\end{pmatrix}"],
            [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", "-2"],
        ),
        (r"\begin{pmatrix} 1/3 \\ -5/2 \end{pmatrix}", [r"\begin{pmatrix} \frac13 \\ -\frac52 \end{pmatrix}", r"\begin{bmatrix} 1/3 \\ -2.5 \end{bmatrix}"], [r"\begin{pmatrix} -5/2 \\ 1/3 \end{pmatrix}"]),
        (r"\begin{pmatrix} -2 \\ 1 \end{pmatrix}", [r"\begin{pmatrix}-2\\1\end{pmatrix}", r"\begin{pmatrix} -2\\ 1\\ \end{pmatrix}"], [r"\begin{pmatrix}1\\-2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"]),
    ],
    "equations": [  # the right-hand side alone is enough where the left is one name
        ("x = 5", ["x=5", "5", "x = 5.0", r"x=\frac{10}{2}"], ["x=6", "6", "x=-5", "x+5"]),
        ("5", ["x=5", "x = 5", "n=5", "2+3=5", r"f(3) = 5", r"a_5=5"], ["x=6", "5=x+1", "x=5y"]),
        ("y = 2x + 1", ["y=2x+1", "y=1+2x", "2x+1", r"2x - y + 1 = 0", "y-1=2x", r"y=2(x+\frac12)"], ["y=2x-1", "2x+y+1=0", "y=x+2", "x=2y+1", "2x"]),
        ("x^2+y^2=4", ["x^2+y^2=4", "y^2+x^2=4", "x^2+y^2-4=0", "x^{2}+y^{2}=2^2"], ["x^2+y^2=2", "x^2-y^2=4", "4", "x+y=2"]),
        ("f(x)=x^2", ["f(x)=x^2", "x^2", "f(x) = x^{2}", r"x \cdot x"], ["f(x)=x^3", "2x", "f(x)=-x^2"]),
        ("2x+3y=6", ["2x+3y=6", "3y+2x=6", "4x+6y=12", "2x+3y-6=0"], ["2x+3y=7", "3x+2y=6", "2x+3y"]),
    ],
    "several answers": [
        ("2, 3", ["2, 3", "3, 2", "2,3", "2 and 3", r"2 \text{ and } 3", r"x=2, x=3", r"x=2 \text{ or } x=3", "x = 2, 3", r"\{2,3\}", r"x_1=2, x_2=3", "2; 3", "2 or 3", r"2 \quad\text{or}\quad 3"],
         ["2", "3", "2,4", "2,3,4", "23", "5", "x=2, x=4"]),
        ("1, -1", [r"\pm 1", r"\pm1", "1,-1", "-1, 1", r"x=\pm 1", r"1 \text{ or } -1"], ["1", "-1", r"\pm 2", "0"]),
        ("$2$,$3$", ["2, 3", "3,2", r"2 \text{ and } 3"], ["2", "3", "23"]),
        (r"\pm\sqrt{2}", [r"\sqrt2, -\sqrt2", r"\pm \sqrt2", r"x = \pm\sqrt{2}"], [r"\sqrt{2}", r"\pm 2", r"-\sqrt{2}"]),
        ("x=1 or x=-3", ["1,-3", "x=1, x=-3", r"-3 \text{ and } 1", "x=-3 or x=1"], ["1", "1,3", "-1,3"]),
        ("100, 200", ["100, 200", "200, 100", "100,200"], ["100200 ", "100", "300"]),
        (r"1+\sqrt{2}, 1-\sqrt{2}", [r"1\pm\sqrt{2}", r"1-\sqrt2, 1+\sqrt2"], [r"1+\sqrt{2}", r"\pm\sqrt2"]),
        (
            "a=1, b=2",  # values without names are in the gold's order, unless its names are one letter
            ["a=1, b=2", "a = 1, b = 2", "b=2, a=1", "1, 2", "(1,2)", "(a,b)=(1,2)", "1 and 2", r"\{1,2\}"],
            ["a=2, b=1", "a=1", "a=1, b=3", "b=1, a=2", "2, 1", "(2,1)", "(a,b)=(2,1)", r"\{2,1\}", "1", "1, 2, 3", "12"],
        ),
        (r"x=3 \text{ and } y=200", ["3,200", "(3,200)"], ["(200,3)", "200, 3", "3200"]),
        (r"\alpha=1, \beta=2", ["1, 2"], ["2, 1"]),
        ("x=1 or x=2", ["2, 1", "1, 2", r"\{2,1\}"], ["2, 3"]),
        ("x_1=2, x_2=3", ["3, 2", "2, 3"], ["2"]),
    ],
    "text": [  # case and spaces do not count
        ("Monday", ["Monday", r"\text{Monday}", "monday", r"\textbf{Monday}", r"\mathrm{Monday}"], ["Sunday", "Mon", r"\text{Friday}", "dynamo", "Mondays off"]),
        ("yes", ["yes", r"\text{Yes}", "YES", "Yes.", r"\textit{yes}"], ["no", "sey", "yess", r"\text{No}"]),
        ("no", ["no", r"\text{no}", "No"], ["yes", "on", "0", r"\text{not}"]),
        ("New York", ["New York", r"\text{New York}", r"\text{new york}"], ["York", r"\text{New Jersey}", "York New"]),
        ("increasing", ["increasing", r"\text{increasing}"], ["decreasing", r"\text{constant}"]),
        (r"\text{no solution}", [r"\text{no solution}", "no solution", r"\text{No solution}."], [r"\text{one solution}", "0"]),
        ("even", ["even", r"\text{even}"], ["odd", "neve"]),
        ("east", ["east", r"\text{East}"], ["seat", "west", "eats"]),
        (r"\text{Alice}", ["Alice", r"\text{Alice}", r"\text{ alice }"], [r"\text{Bob}", "Celia", "A"]),
        ("undefined", ["undefined", r"\text{undefined}"], ["0", r"\infty", "defined"]),
        ("circle", ["circle", r"\text{circle}", r"\text{Circle}"], [r"\text{ellipse}", "cleric"]),
        ("True", ["True", r"\text{true}"], ["False", r"\text{false}"]),
    ],
    "choices": [
        ("A", ["A", r"\text{A}", "(A)", r"\text{(A)}", "A.", "A)", r"\textbf{A}", r"\textbf{(A)}", "[A]", r"\mathrm{A}"], ["B", r"\text{B}", "(B)", "AB", "1", "D"]),
        ("C", ["C", r"\text{C}", "(C)", r"\textbf{(C)}"], ["B", "A", "D", "CC"]),
        ("(B)", ["B", "(B)", r"\text{B}", r"\textbf{(B)}"], ["A", "(A)", "8"]),
        ("E", ["E", r"\text{E}", "(E)", r"\textbf{(E)}"], ["A", "2.718", "F", "D"]),
        ("D", ["D", r"\text{D}", r"\text{(D)}", "(D)"], ["E", "B"]),
        (r"\textbf{(A)}\ 5", ["A", "5", r"\textbf{(A)}\ 5", "(A) 5", r"\text{A}"], ["B", "6", r"\textbf{(B)}\ 6"]),
        ("F", ["F", r"\text{F}"], ["E", "f(x)"]),
        ("A, C", ["A, C", "C, A", r"\text{A, C}", r"\text{A and C}", r"\text{A}, \text{C}", "AC", r"\text{AC}"], ["A", "A, B", "A, B, C", "CA", "AB", "ACD"]),
        ("ACD", ["ACD", "A, C, D", r"\text{A, C, D}", "D, A, C", "A, C and D"], ["A, C", "A, B, D", "ACDE", "A, C, D, E", "A"]),
    ],
    "thousands separators": [
        ("1,000", ["1000", "1,000", "1{,}000", r"1\,000", "1 000", r"1{,}000.0", r"1\;000", "10^3"], ["1", "100", "1,001", "10,000", "0", "1.0"]),
        ("12,345,678", ["12345678", "12,345,678", r"12\,345\,678", "12{,}345{,}678"], ["12345", "12,345,679", "12"]),
        ("1234.5", ["1,234.5", r"1{,}234.5", "1234.50", r"1\,234.5"], ["12345", "1,234"]),
        (1000000, ["1,000,000", r"10^6", r"1{,}000{,}000"], ["100,000", "1,000"]),
        ("-2,500", ["-2500", "-2,500", "-2{,}500"], ["2500", "-2"]),
    ],
    "mixed numbers": [
        (r"2\frac{1}{2}", ["2.5", r"\frac52", r"2\frac12", "5/2", r"2 \frac{1}{2}", "2 1/2", r"2\tfrac12", "2½", r"2+\frac12"], ["1", r"\frac{21}{2}", r"2\cdot\frac12", r"\frac{1}{2}", "2"]),
        ("2 1/2", ["2.5", r"\frac{5}{2}", r"2\frac{1}{2}", "2 1/2"], ["10.5", "1", r"\frac{21}{2}"]),
        (r"-1\frac{3}{4}", ["-1.75", r"-\frac74", r"-1\frac34"], ["-0.25", "1.75", r"-\frac{3}{4}"]),
        (r"3\frac{1}{7}", [r"\frac{22}{7}", "22/7"], [r"\frac37", r"\frac{31}{7}"]),
    ],
    "huge numbers": [  # none may take long
        ("2^{100}", ["2^{100}", "1267650600228229401496703205376", "4^{50}", r"2^{50}\cdot 2^{50}"], ["2^{101}", "1267650600228229401496703205375", "2^{10}", "100"]),
        ("10^{10^{10}}", ["10^{10^{10}}", "10^{10000000000}", "100^{5000000000}"], ["10^{10^{11}}", "10^{100}", "10", r"10^{10^{10}}+1"]),
        ("7", ["7"], ["9^{9^{9^9}}", "(10^{10})!", "((9!)!)!", r"2^{2^{2^{2^{2^2}}}}", r"\binom{10^{12}}{10^{11}}", r"7^{10^{20}}", r"99999999^{99999999}", r"\sum_{k=1}^{10^{12}} k!", r"\prod_{k=1}^{10^{15}} k", "1e999999999", "(-2)^{99999999999}", "(1/3)^{99999999999}", r"(x+1)^{1000000}"]),
        ("100!", ["100!", r"100 \cdot 99!"], ["99!", "100", "101!", "100^{100}"]),
        ("(10^6)!", ["(10^6)!", "1000000!"], ["(10^6-1)!", "10^6!!", "(10^5)!"]),
        ("2023^{2023}", ["2023^{2023}"], ["2023^{2022}", "2022^{2023}", r"2023\cdot 2023"]),
        ("2^{2^{100}}", ["2^{2^{100}}", "4^{2^{99}}"], ["2^{100}", "2^{2^{101}}", "4^{2^{100}}"]),
        ("10^{100}+1", ["10^{100}+1", "1+10^{100}"], ["10^{100}", "10^{100}-1", "10^{101}"]),
        (r"\binom{100}{50}", [r"\binom{100}{50}", r"\frac{100!}{50!50!}", "100891344545564193334812497256"], [r"\binom{100}{49}", r"\frac{100!}{50!}"]),
        (r"\frac{1}{2^{1000000}}", [r"\frac{1}{2^{1000000}}", "2^{-1000000}"], ["2^{1000000}", "0", "2^{-1000001}"]),
        ("3^{1000000}-1", ["3^{1000000}-1", "-1+3^{1000000}"], ["3^{1000000}", "3^{1000000}+1"]),
        ("5040", ["7!", "5040"], ["6!", "7"]),
    ],
    "sums, products and limits": [
        ("5050", [r"\sum_{k=1}^{100} k", r"\frac{100\cdot 101}{2}"], [r"\sum_{k=1}^{99} k"]),
        (r"\frac13", [r"\int_0^1 x^2 dx"], [r"\int_0^1 x dx"]),
        ("120", [r"\prod_{k=1}^{5} k"], [r"\prod_{k=1}^{4} k"]),
        ("1", [r"\lim_{x\to 0}\frac{\sin x}{x}"], [r"\lim_{x\to 0}\frac{\sin 2x}{x}"]),
    ],
    "small numbers": [  # math-verify takes a difference below 1e-15 for none
        ("10^{-20}", ["10^{-20}", r"\frac{1}{10^{20}}", "1e-20"], ["10^{-30}", "0", "10^{-21}"]),
        (r"\sqrt2\cdot 10^{-20}", [r"\frac{2}{\sqrt2}\cdot 10^{-20}"], [r"\sqrt2\cdot 10^{-30}", "0"]),
        (r"\frac{1}{50!}", [r"\frac{1}{50!}"], [r"\frac{1}{49!}", "0"]),
    ],
    "moduli": [
        (r"3 \pmod 5", ["3", r"3 \pmod{5}", r"x \equiv 3 \pmod 5"], [r"3 \pmod 7", "5", "2"]),
        (r"x \equiv 3 \pmod{5}", [r"x\equiv 3 \pmod 5", "3"], [r"x\equiv 2 \pmod 5"]),
    ],
    "other notations of sets": [
        (r"\{x \mid x > 2\}", ["x>2", r"(2,\infty)", r"\{x : x>2\}", r"\{x\in\mathbb{R} \mid 2<x\}"], ["x<2", r"[2,\infty)"]),
        ("]0,1[", ["(0,1)", "]0,1["], ["[0,1]", "[0,1["]),
        ("all real numbers", [r"\mathbb{R}", r"(-\infty,\infty)", r"\text{all real numbers}"], [r"\mathbb{Z}", r"(0,\infty)"]),
        ("x>2 and x<5", ["(2,5)", "2<x<5", r"x<5 \text{ and } x>2"], [r"x>2 \text{ or } x<5", "x>2", "[2,5]"]),
    ],
    "times of day": [  # h:mm is not the fraction h/mm
        ("3:30", ["3:30", r"3{:}30", r"3\!:\!30", r"3:30 \text{ p.m.}", "3:30 PM", r"\text{3:30 PM}", "03:30"], ["1:10", "3:03", "0.1", "3:31", "6:60", "330", r"\frac{1}{10}"]),
        ("10:45 a.m.", ["10:45 a.m.", r"10\!:\!45 \text{ a.m.}", "10:45", r"\text{10:45 AM}", "10:45am"], ["10:54", "10:45 p.m.", "2:9"]),
        ("9:00 PM", ["9:00 PM", "9:00", r"9:00 \text{ pm}"], ["9:00 AM", "9:30 PM", "8:00 PM"]),
        ("3:45 pm", ["15:45", "3:45 pm", r"15{:}45"], ["16:45", "3:45 am", "15:44", "13:45"]),
        ("15:30", ["15:30", "3:30 pm", r"3:30 \text{ p.m.}"], ["3:30 am", "3:30", "4:30 pm"]),
        ("12:05", ["12:05", r"12\colon 05"], ["12:50", "12:5 5", "2.4"]),
    ],
    "ratios": [
        ("3:4", ["3:4", "3 : 4", r"3\colon 4", r"\frac34", "6:8", "3/4", r"3 \text{ to } 4", "0.75"], ["4:3", "3:5", "34"]),
        ("1:2:3", ["1:2:3", "1 : 2 : 3", "2:4:6"], ["1:3:2", "3:2:1", r"\frac16", "1:2", "1:2:4"]),
        ("5:12", ["5:12", r"\frac{5}{12}"], ["12:5", "5:13"]),
    ],
    "signs and trailing characters": [
        ("73.", ["73", "73.", "73.0"], ["37", "0.73", "7.3"]),
        ("**12**", ["12", "**12**", r"\mathbf{12}"], ["1", "2", "144", "21"]),
        ("`9`", ["9"], ["6"]),
        ("6;", ["6", "6;", "6,", "6 ."], ["7"]),
        ("=8", ["8", "=8", r"\approx 8", r"= 8"], ["-8"]),
        ("Answer: 14", ["14", r"\text{Answer: }14", "Answer: 14"], ["41"]),
        ("The answer is 19.", ["19", r"\text{The answer is } 19"], ["91"]),
        ("\n 4 \n", ["4", " 4\n", r"\ 4\ ", r"4\,", r"4~", r"4\quad", r"4\\"], ["44"]),
        ('"x+1"', ["x+1", "1+x"], ["x-1"]),
        ("_15_", ["15"], ["51"]),
    ],
    "scientific notation": [
        (1e-05, ["0.00001", "10^{-5}", r"1\times10^{-5}", r"\frac{1}{100000}", "1e-5", "1e-05", r"1 \cdot 10^{-5}"], ["-2.28", "10^{-4}", "0", "e-5", "0.000014"]),
        (1e16, ["10000000000000000", "10^{16}", r"1 \times 10^{16}", "1e16", "10,000,000,000,000,000"], ["10^{15}", "1", "16e", "1e17"]),
        ("6.02e23", [r"6.02\times10^{23}", r"6.02 \times 10^{23}", r"6.02\cdot 10^{23}", "6.02e23", "6.02E+23", "6.02 x 10^{23}", "6.02 x 10^23", "6.02×10²³"], [r"6.02\times 10^{22}", "6.02", r"6.03\times10^{23}"]),
        (r"3.2 \times 10^{-4}", ["0.00032", r"3.2\times10^{-4}", r"32\times 10^{-5}", "3.2e-4", "3.2 x 10^{-4}", "3.2×10⁻⁴"], [r"3.2\times10^4", "0.0032"]),
        (2.5, ["2.5", r"\frac{5}{2}"], ["25"]),
        (70.0, ["70", "70.0"], ["7"]),
    ],
    "infinities": [
        (r"\infty", [r"\infty", r"+\infty", "∞", r"\text{infinity}", "infinity"], [r"-\infty", "0", "8"]),
        (r"-\infty", [r"-\infty", "-∞", r"- \infty"], [r"\infty", "0"]),
        (float("inf"), [r"\infty"], ["1", r"-\infty"]),
    ],
    "variables": [
        ("x", ["x", "{x}", r"\mathit{x}"], ["y", "1", "2x", "x^2"]),
        ("x^2-1", ["x^2-1", "(x-1)(x+1)", "x^{2}-1", "-1+x^2", "x**2-1", "x²-1"], ["x^2+1", "(x-1)^2", "x-1", "1-x^2"]),
        ("2n+1", ["2n+1", "1+2n", "2 n + 1", r"2\cdot n+1", "n+n+1"], ["2n-1", "2m+1", "n+1", "3"]),
        (r"\frac{n(n+1)}{2}", ["n(n+1)/2", r"\frac{n^2+n}{2}", r"\frac12 n(n+1)", r"\binom{n+1}{2}"], ["n(n+1)", r"\frac{n(n-1)}{2}"]),
        ("2ab", ["2ab", "2ba", r"2 \cdot a \cdot b"], ["2", "ab", "2a+b"]),
        ("3m", ["3m", "m+m+m"], ["3", "3n", "3h"]),
        ("a_1", ["a_1", "a_{1}"], ["a_2", "a", "1"]),
        (r"\alpha+\beta", [r"\alpha+\beta", r"\beta + \alpha"], [r"\alpha-\beta", r"\alpha\beta"]),
        ("xy", ["xy", "yx", r"x\cdot y"], ["x+y", "x"]),
        ("e^{2x}", ["e^{2x}", "(e^x)^2", r"\exp(2x)"], ["e^x", "e^2x", "2e^x"]),
    ],
    "inequalities": [
        ("x>5", ["x>5", "5<x", r"(5,\infty)", r"x \gt 5", "x > 5.0"], [r"x\ge5", "x<5", "5", "x>6", r"[5,\infty)"]),
        (r"x \ge 5", [r"x\geq 5", r"x \ge 5", "x>=5", "x≥5", r"5\le x", r"[5,\infty)"], ["x>5", r"x\le 5", "5"]),
        ("-1<x<3", ["-1<x<3", "(-1,3)", "3>x>-1", r"x\in(-1,3)", r"-1 \lt x \lt 3"], [r"-1\le x<3", "-1<x<2", "[-1,3]", "1<x<3"]),
        ("x<-1 or x>3", [r"x<-1 \text{ or } x>3", r"x>3 \text{ or } x<-1", r"(-\infty,-1)\cup(3,\infty)", "x<-1, x>3"], ["-1<x<3", "x<-1", r"x\le -1 \text{ or } x\ge 3"]),
        (r"x \ne 2", [r"x\neq 2", r"x \ne 2", "x≠2"], ["x=2", "x>2", "2"]),
        (r"a \le b", [r"a\leq b", r"b \ge a"], ["a<b", r"a\ge b"]),
    ],
    "roots": [
        (r"\sqrt3", [r"\sqrt{3}", r"\sqrt3", r"\sqrt 3", "3^{1/2}", r"3^{\frac12}", r"\frac{3}{\sqrt3}", "√3", "sqrt(3)", "sqrt3"], ["3", r"\sqrt{2}", r"-\sqrt3", r"\sqrt[3]{3}", "1.7"]),
        (r"2\sqrt{3}", [r"\sqrt{12}", r"2\sqrt3", "2√3", "2*sqrt(3)", r"2 \cdot \sqrt{3}", r"\sqrt3\cdot2"], [r"\sqrt{6}", r"3\sqrt{2}", "2", r"2\sqrt{2}", "23"]),
        (r"\frac{1}{\sqrt{2}}", [r"\frac{\sqrt2}{2}", r"\frac1{\sqrt2}", r"2^{-1/2}", r"\sqrt{\frac12}"], [r"\sqrt{2}", r"\frac{1}{2}"]),
        (r"\sqrt[3]{2}", [r"\sqrt[3]{2}", r"\sqrt[3]2", "2^{1/3}", r"2^{\frac{1}{3}}"], [r"\sqrt{2}", r"3\sqrt{2}", "2", r"\sqrt[3]{3}"]),
        ("2", [r"\sqrt[3]{8}", r"\sqrt4", r"|-2|", r"\lfloor 2.7 \rfloor", r"\log_2 4", r"\lceil 1.2\rceil"], [r"\sqrt{8}", r"\sqrt2"]),
        (r"\sqrt{2+\sqrt3}", [r"\sqrt{2+\sqrt{3}}", r"\frac{\sqrt6+\sqrt2}{2}"], [r"\sqrt{2}+\sqrt{3}", r"\sqrt{2-\sqrt3}"]),
        (r"1+\sqrt5", [r"\sqrt5+1", r"\sqrt{5}+1"], [r"1-\sqrt5", r"\sqrt{6}", r"1\sqrt5"]),
    ],
    "pi, e and logarithms": [
        (r"4\pi", [r"4\pi", "4π", r"\pi \cdot 4", "4*pi", "4pi", r"4 \pi"], ["4", r"\pi", r"4\pi^2", "12.5"]),
        (r"\pi", [r"\pi", "π", "pi"], ["3.14", "3", r"\frac{22}{7}", r"2\pi", "ip"]),
        (r"e^2", ["e^2", "e^{2}", r"e \cdot e", r"\exp(2)", r"\mathrm{e}^2"], ["2e", "e", "7.4", "2"]),
        (r"\ln 2", [r"\ln 2", r"\ln(2)", r"\ln{2}", r"\log_e 2", r"-\ln\frac12", r"\frac{\ln 4}{2}"], [r"\log_{10} 2", "2", r"\ln 3"]),
        (r"\log_2 3", [r"\log_2 3", r"\log_{2}{3}", r"\frac{\ln 3}{\ln 2}", r"\log_2(3)"], [r"\log_3 2", "3", r"\log_2 4"]),
        ("-1", [r"e^{i\pi}", "i^2", r"\cos\pi"], [r"e^{\pi}", "i", "1"]),
    ],
    "trigonometry": [
        (r"\frac{1}{2}", [r"\sin\frac{\pi}{6}", r"\sin 30^\circ", r"\cos 60^\circ", r"\sin(30^{\circ})", r"\cos\frac\pi3"], [r"\sin 60^\circ", r"\cos 30^\circ", r"\sin 30"]),
        (r"\sin x", [r"\sin x", r"\sin(x)", r"\sin{x}", "sin(x)", r"\cos(\frac{\pi}{2}-x)"], [r"\cos x", "x", r"\sin 2x", r"\sin y"]),
        (r"\arctan 2", [r"\arctan 2", r"\arctan(2)", r"\tan^{-1} 2", r"\tan^{-1}(2)"], [r"\tan 2", "2", r"\arctan 3"]),
        (r"1", [r"\sin^2 x+\cos^2 x", r"\tan 45^\circ", r"\tan\frac{\pi}{4}"], [r"\sin^2 x", r"\tan 45"]),
        (r"\frac{\sqrt{3}}{2}", [r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}", r"\frac12\sqrt3", r"\sin 60^\circ", r"\sqrt{3}/2"], [r"\frac{\sqrt{2}}{2}", r"\frac{3}{2}", "0.86"]),
    ],
    "complex numbers": [
        ("3+4i", ["3+4i", "4i+3", "3 + 4i", r"3+4\mathrm{i}", r"3 + 4 i"], ["3-4i", "4+3i", "7", "5", "3+4"]),
        ("i", ["i", r"\mathrm{i}", r"\sqrt{-1}"], ["-i", "1", "j"]),
        ("2i", ["2i", r"2\cdot i"], ["2", "-2i", "2j"]),
        (r"\frac{1+i}{2}", [r"\frac{1}{2}+\frac{1}{2}i", r"\frac{1+i}2", r"\frac12+\frac i2"], [r"\frac{1-i}{2}", "1+i"]),
    ],
    "names of geometry": [
        ("AB", [r"\overline{AB}", r"\overrightarrow{AB}"], [r"\overline{AC}"]),
        (r"\angle A", ["A", r"\angle A"], ["B", r"\angle B"]),
        (r"\vec{a}", ["a", r"\vec{a}"], [r"\vec{b}"]),
        (r"2i+3j", [r"2\mathbf{i}+3\mathbf{j}"], [r"3\mathbf{i}+2\mathbf{j}"]),
        (r"\overline{z}", [r"\overline{z}"], ["z"]),
        ("I and III", [r"\text{I and III only}", "I, III"], [r"\text{II and III only}", "I"]),
    ],
    "ordinals": [
        ("3rd", ["3", "3rd", r"3^{\text{rd}}", r"3\text{rd}"], ["2nd", "4", "33"]),
        ("21st", ["21", "21st", r"21^{\text{st}}"], ["12", "1"]),
        ("5th", ["5th", r"5^{th}", r"5^\text{th}"], ["6th"]),
    ],
    "number bases": [  # the base may be missing, as a unit may
        ("101_2", ["101_2", "101₂", "101_{2}", "101", "5", r"101_{\text{2}}"], ["101_3", "101₃", "110_2", "10", "111_2"]),
        ("5", ["101_2", "12_3"], ["101_3", "5_2"]),
        ("2A_{16}", ["2A_{16}", "42", r"2\text{A}_{16}"], ["2B_{16}", "43"]),
    ],
    "wrappings": [
        (r"\boxed{7}", ["7", r"\boxed{7}", r"\text{7}", r"\fbox{7}", r"\textcolor{red}{7}", r"\color{blue}7", r"\underline{7}", r"\bf 7", r"\(7\)", "$7$", r"\mathbf{\text{7}}", r"\bm{7}"], ["8", r"\boxed{8}", "77"]),
        (r"\(x\)", ["x"], ["y"]),
        (r"$\frac{1}{2}$", ["1/2", "0.5"], ["2"]),
        (r"\[ 2^{10} \]", ["1024", "2^{10}"], ["20", "210"]),
        (r"so it is $\frac{1}{2}$", [r"\frac12"], ["2"]),
        (r"$$12$$", ["12"], ["1"]),
        ("6 * 12 = <<6*12=72>>72\n#### 72", ["72", r"72\text{ eggs}"], ["6", "12", "27"]),
        ("He pays 3 * 5 = $<<3*5=15>>15.\n#### $15", ["15", r"\$15"], ["3", "5"]),
        ("#### 1,234", ["1234", "1,234"], ["1", "234"]),
        ("#### -3.50", ["-3.5"], ["3.5"]),
        (r"Thus the sum is $a+b=\boxed{12}$.", ["12"], ["a+b", "21"]),
        (r"First \boxed{3}, which fails the check, so the value that we want has to be \boxed{4}.", ["4"], ["3", "3,4"]),
    ],
    "no answer": [
        ("5", [], ["", " ", "?", r"\text{unknown}", r"\text{}", "{}", "None", "nan", r"\ldots", "_", r"\square", "x", "[5", r"\frac{5}{", "5 6", "5, 5.5"]),
        ("x", [], ["", "?", r"\text{I do not know}"]),
        ("0", [], ["", "None", r"\text{}", "nan"]),
    ],
}  # fmt: skip

TEXTS: dict[str, list[tuple[object, list[str], list[str]]]] = {
    "several boxes": [  # the last counts; boxes with nothing but a comma, "and" or "or" between them are one answer
        (
            "4",
            [
                r"\boxed{3}. Wait, that is wrong. \boxed{4}",
                r"\boxed{3} no, \boxed{4}",
                r"First I thought \boxed{3}, but the case $n=1$ is impossible, or so it seems, hence \boxed{4}.",
                r"\boxed{4}. To check: \boxed{4}",
                r"\boxed{3}\boxed{4}" + "\n\n" + r"The final answer is \boxed{4}",
                "The answer is $\\boxed{5}$.\n\nLet me recompute.\n\nThe answer is $\\boxed{4}$.",
            ],
            [
                r"\boxed{4}. Wait, that is wrong. \boxed{3}",
                r"\boxed{4} no, \boxed{3}",
                r"\boxed{3} or \boxed{4}",
                r"\boxed{4}, \boxed{3}",
                r"\boxed{4} \boxed{5}",
                r"Either \boxed{4} or \boxed{5} or \boxed{6}",
                r"\boxed{4} is the value at $n=1$, but at $n=2$ it is \boxed{5}.",
            ],
        ),
        (
            "2, 3",
            [
                r"\boxed{2} and \boxed{3}",
                r"\boxed{2}, \boxed{3}",
                r"$x=\boxed{2}$ or $x=\boxed{3}$",
                r"\boxed{3} \text{ and } \boxed{2}",
                "$\\boxed{2}$ and $\\boxed{3}$.",
                r"$x_1 = \boxed{2}$, $x_2 = \boxed{3}$",
                r"\boxed{1}, no, that fails, so we are left with the two roots \boxed{2} and \boxed{3}",
            ],
            [r"\boxed{2}. Then \boxed{3}", r"\boxed{2} and \boxed{4}", r"\boxed{2}", r"\boxed{2}, \boxed{3}, \boxed{4}"],
        ),
    ],
    "unclosed boxes": [  # what is cut off is no answer
        ("42", [], [r"The answer is \boxed{42", r"\boxed{42 so", r"\boxed{", r"\boxed", r"\boxed{42} is what I thought, but it is \boxed{43", r"$\boxed{42"]),
        (r"\frac{1}{2}", [], [r"\boxed{\frac{1}{2}", r"\boxed{\frac{1}{2"]),
        ("{1,2}", [], [r"\boxed{\{1,2"]),
    ],
    "boxes in other forms": [
        ("42", [r"\boxed {42}", r"\boxed{ 42 }", r"$$\boxed{42}$$", r"\[\boxed{42}\]", r"**\boxed{42}**", r"\fbox{42}", r"$\boxed{x=42}$", r"\boxed 42", r"\boxed{\boxed{42}}",
                "\\boxed{\n42\n}", r"\( \boxed{42} \).", r"\boxed{42}$ dollars", r"$\boxed{42}\text{ cm}$"],
         [r"boxed{42}", r"\boxed{43} (not 42)", r"\boxed{}", r"\boxed{} 42", r"\box{42}"]),
        (r"\{1,2\}", [r"\boxed{\{1,2\}}", r"\boxed{\left\{1,2\right\}}"], [r"\boxed{\{1,3\}}"]),
        (r"50\%", [r"$\boxed{50}\%$", r"\boxed{50\%}", r"\boxed{50}%"], [r"\boxed{5}\%"]),
        (r"\frac{1}{2}", [r"$\boxed{\dfrac{1}{2}}$", r"\boxed{\frac12}.", r"$\boxed{\tfrac12}$"], [r"\boxed{\frac{1}{3}}"]),
        ("30°", [r"$\boxed{30}^\circ$", r"$\boxed{30^\circ}$"], [r"$\boxed{60}^\circ$"]),
    ],
    "answers without a box": [  # an announced answer counts, a number that merely stands there does not
        ("72", ["6 * 12 = 72\n#### 72", "The final answer is $72$.", "The final answer is $72$. I hope it is correct.", "#### 72.", "**Final answer:** $72$"], ["72", "6 * 12 = 72", "#### 6", "The final answer is $71$.", "Let $n=72$.", "#### 72\n#### 73"]),
        (r"\frac14", [r"The final answer is $\frac14$.", r"The final answer is $\frac{1}{4}$."], [r"The final answer is $\frac41$."]),
        ("5", ["The answer is $5$.", "**Answer**: $5$", r"Answer: \(5\)", "The answer is: $$5$$", "The answer is $4$. No, the answer is $5$."],
         ["", " ", "I do not know.", "5", "None", "\n", "I do not know the answer. $5$", "The answer is 5.", "The answer is $5$. No, the answer is $4$.", "The answer is not $5$."]),
        ("2, 3 ", ["The answer is $2$ and $3$.", "The answers are 2 and 3.\n#### 3, 2"], ["The answer is $2$. And $3$ is none."]),
        ("50% ", [r"The answer is $50$\%."], [r"The answer is $5$\%."]),
    ],
    "think tags": [
        ("4", [r"<think>maybe \boxed{3}</think>The answer is \boxed{4}.", r"<think>\boxed{4}</think> \boxed{4}"], [r"<think>\boxed{4}</think>So \boxed{3}", "<think>4</think>", "<think>the answer is 4"]),
    ],
    "huge texts": [
        ("4", ["Let $a=1$. " * 3000 + r"\boxed{4}", r"so \boxed{3}, " * 500 + "and now for something else entirely: " + r"\boxed{4}"], ["$a$ and " * 3000, "{" * 5000 + r"\boxed{5}", r"\boxed{" * 3000 + "4", r"\boxed{" + "(" * 2000 + "5" + ")" * 2000 + "}"]),
    ],
}  # fmt: skip


UNMET = [
    ("2 m", "200 cm", 1.0),  # no unit is converted
    ("75 cents", r"\$0.75", 1.0),
    ("2", r"\text{two}", 1.0),  # no number is read from words
    ("3rd", "third", 1.0),
    (r"\{}_5C_2", "10", 1.0),
    ("6^{100000}", r"2^{100000}\cdot 3^{100000}", 1.0),  # too large to compute, and compared by its form
    ("0.123456", "0.1234561", 0.0),  # decimals agree to six places
    ("12 apples", "12 pears", 0.0),  # units that are not known are not compared
]
"""Golds, box contents and rewards that are not met: by math-verify, and by what is in front of it."""


def pairs() -> list[tuple[str, object, str, float]]:
    """Rows of kind, gold, completion and reward."""
    rows = []
    for table, template in ((BOXED, r"Hence \boxed{%s}."), (TEXTS, "%s")):
        for kind, golds in table.items():
            for gold, right, wrong in golds:
                rows += [(kind, gold, template % text, 1.0) for text in right]
                rows += [(kind, gold, template % text, 0.0) for text in wrong]
    return rows


def count_of_trl() -> int:
    """How many pairs TRL's reward grades rightly, with the golds as they are."""
    from tqdm import tqdm
    from trl.rewards import accuracy_reward

    graded = (
        accuracy_reward([[{"role": "assistant", "content": text}]], [str(gold)]) == [reward]
        for _, gold, text, reward in tqdm(pairs())
    )
    return sum(graded)


if __name__ == "__main__":
    print(f"{count_of_trl()} of {len(pairs())}")

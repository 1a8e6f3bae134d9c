"""Builds the DOCX and PDF files of examples/: python tests/build_examples.py. The same texts give the same bytes.

Needs python-docx and reportlab. The texts below are in a small subset of Markdown: headings, paragraphs, "- " lists,
tables, and a line "---" for a new page. Lines of a paragraph are joined.
"""

import io
import zipfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from docx import Document
from reportlab.lib import colors
from reportlab.lib.styles import ParagraphStyle
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.cidfonts import UnicodeCIDFont
from reportlab.platypus import Flowable, PageBreak, Paragraph, SimpleDocTemplate, Spacer, Table

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

LEAVE_AND_EXPENSES = """
# Leave and expenses policy

Document NWW-P-003, version 12, in force from 1 January 2025. Owner: Human Resources, Beatrice Nkemelu. This policy
applies to everyone employed by Northfield Water Works for longer than three months. Apprentices follow it as well,
unless their contract says otherwise.

## 1. Annual leave

### 1.1 How many days

Full-time employees have 27 days of annual leave per calendar year. Employees on rotating shifts have 30 days, because
some of their free days fall on public holidays. Part-time employees have a share in proportion to their weekly hours,
rounded up to the next half day.

After ten years with the company, two further days are added. In the first year, leave is earned month by month, and
it may be taken before it is earned only if the team leader agrees.

### 1.2 Asking for leave

Ask for leave in the staff portal. Leave of more than five days in a row has to be requested at least six weeks ahead;
shorter leave, one week ahead. The team leader answers within three working days. In July and August at least half of
each maintenance crew stays on duty, and requests that arrive first come first.

### 1.3 Carrying over

Up to eight unused days may be carried over and must be taken by 31 March of the next year. Days that are left after
this date lapse, except when sickness or the company's own needs prevented the leave.

## 2. Other absence

### 2.1 Sickness

Report sick to your team leader before the start of the shift. A doctor's certificate is needed from the fourth day of
sickness. Full pay continues for eight weeks, and after that the insurance pays 70 % of it.

### 2.2 Special leave

| Occasion | Paid days |
|---|---|
| Own wedding | 2 |
| Birth of a child, for the other parent | 15 |
| Death of a close relative | 4 |
| Moving house | 1 |
| Blood donation | half a day, at most three times a year |

### 2.3 Training

Every employee may spend five paid days per year on training. Courses that cost more than 1,200 crowns are approved by
the head of department; whoever leaves within twelve months of such a course pays back half of its price.

## 3. On-call duty

The on-call week runs from Friday 14:00 to the next Friday 14:00. The on-call allowance is 215 crowns per week, and
every call-out is paid with at least two hours. After a call-out between 23:00 and 05:00 the next shift starts at
11:00.

## 4. Travel and expenses

### 4.1 Before the journey

Journeys with a night away from home need the approval of the team leader. Trains are booked in second class; flights
are allowed only if the train takes longer than seven hours. Foreign journeys are approved by the managing director,
Alasdair Quill.

### 4.2 What is refunded

- Use of a private car is refunded at 0.38 crowns per kilometre, and of a private bicycle at 0.12.
- Hotels are refunded up to 115 crowns per night, breakfast included.
- The daily allowance for meals is 31 crowns on a full day and 16 crowns on the day of departure or return.
- Tips, fines and minibar drinks are not refunded.

### 4.3 Claims

Expense claims must be handed in within 45 days after the journey, with all receipts. Receipts below ten crowns may be
replaced by a signed note. The accounts office pays on the tenth and on the twenty-fifth of each month. A claim above
500 crowns needs two signatures: that of the team leader and that of the head of finance, Rosalind Thackeray.

### 4.4 Company card

The company card is meant for fuel, parking and small spare parts. A single purchase with it must not exceed 250
crowns. A lost card is reported to the accounts office on the same day.

## 5. Questions

Human Resources can be reached on extension 312, every working day from 09:00 to 15:00. Exceptions to this policy need
the agreement of both Human Resources and the works council.
"""

MILLBROOK = """
# Commissioning report: Millbrook booster station

Report NWW-R-088, 28 June 2024. Prepared by Lena Abara, commissioning engineer. Reviewed by Marta Ellingsen, workshop
supervisor.

## 1. Scope

The old station at Millbrook, built in 1976, could no longer fill the tower at Gallows Top in summer. It was replaced
between September 2023 and May 2024 by a new building with three Kestrel K40 pumps, named M1, M2 and M3. Two of them
run in turn; the third is the standby. This report records the tests made from 10 to 21 June 2024 and states what is
left to do.

## 2. Installation

The suction main has a diameter of DN 300 and the discharge main one of DN 250, both of ductile iron. A surge vessel
with a volume of 4,000 litres protects the 2.6 km long pipe to the tower. The vessel is filled with nitrogen to 2.8
bar.

The building stands on piles of 9 m, since the ground is peat. The pump floor lies 1.5 m above the highest flood on
record, that of February 1990. The contractor for the building was Hartwell and Dunmore; the contractor for the
electrical work was Voss Switchgear.

| Pump | Serial number | Impeller | Drive |
|---|---|---|---|
| M1 | 2231 | 268 mm | fixed speed |
| M2 | 2232 | 268 mm | fixed speed |
| M3 | 2240 | 274 mm | frequency converter |

## 3. Preparation

All pipes were tested with water at 16 bar for two hours; the pressure fell by 0.1 bar, and 0.2 bar was allowed. The
mains were then disinfected with chlorine for 24 hours and flushed. Three samples taken on 12 June were free of
coliform bacteria.

---

# 4. Hydraulic tests

Each pump was run alone for four hours. Flow was measured with the new magnetic meter, and head with two calibrated
pressure gauges. The water temperature was 11 °C throughout.

| Pump | Flow | Head | Power | Efficiency |
|---|---|---|---|---|
| M1 | 147 m³/h | 31.6 m | 16.9 kW | 74.9 % |
| M2 | 143 m³/h | 31.9 m | 16.8 kW | 74.0 % |
| M3 | 152 m³/h | 33.1 m | 18.1 kW | 75.7 % |

Pump M2 delivered 143 m³/h, which is 1.4 % below the rated flow; 3 % is tolerated. All three pumps reach the
guaranteed efficiency of 73 %.

## 4.1 Vibration

The highest vibration, 3.1 mm/s, was measured on the drive-end bearing of pump M3 at 42 Hz. Below 38 Hz and above 45
Hz it stays under 2 mm/s. The converter therefore skips the range from 40 to 44 Hz. M1 and M2 showed 1.7 and 1.9 mm/s.

## 4.2 Temperature

After four hours the bearings of M1 had settled at 54 °C, those of M2 at 57 °C and those of M3 at 52 °C. The pump hall
was at 23 °C.

## 4.3 Surge test

At full flow the power was cut by hand. The pressure behind the pumps rose to 7.9 bar and fell to 1.2 bar before it
came to rest after 48 seconds. The limits are 10 bar and 0.5 bar. The check valves closed without a knock.

## 4.4 Noise

With two pumps running, 81 dB(A) was measured in the middle of the hall and 38 dB(A) at the nearest house, 60 m away.
The permit allows 40 dB(A) at night.

---

# 5. Electrical and control tests

The supply is 400 V from the new transformer with 250 kVA. The emergency diesel generator took over the load 11
seconds after the mains had been switched off; 15 seconds were specified. Its tank holds 600 litres, enough for 30
hours with two pumps.

All 64 signals to TideBoard were checked one by one. Two were found exchanged, the door contact and the flood switch,
and were corrected on the same day. The battery of the telemetry unit lasted 9 hours without mains.

## 5.1 Energy

Over the five days of the trial run the station used 0.118 kWh per cubic metre. The old station had used 0.171, so
that the saving is 31 %.

# 6. Open points

- The handrail at the surge vessel is missing. Due on 15 July 2024, Hartwell and Dunmore.
- The spare converter for M3 has not been delivered. Due on 30 August 2024, Voss Switchgear.
- Labels in the switchboard have to be replaced by engraved ones. Due on 31 July 2024, Voss Switchgear.
- The gravel in front of the gate is washed out after rain. Due on 30 September 2024, works department.

# 7. Acceptance

The station was accepted on 26 June 2024 with the four open points above. The warranty runs for 36 months from this
date, and for 60 months for the coating of the pipes. The total cost was 1.84 million crowns, 2 % below the budget.

Signed for Northfield Water Works by Alasdair Quill, managing director, and for the contractors by Greta Hartwell.
"""

HANDBOOK_ZH = """
# 清禾水务员工手册

清禾水务有限公司人力资源部编制，2025年版，自2025年1月1日起施行。本手册适用于与公司签订劳动合同的全体员工，实习生参照执行。
人力资源部经理为韩雪梅，办公地点在总部三楼306室。

## 一、工作时间

总部实行标准工时制，工作时间为上午8:30至12:00、下午13:30至18:00。水厂和泵站实行四班三运转，每班八小时，交接班须提前十五分钟到岗。

因工作需要加班的，须事先经部门负责人批准。每月加班时间不得超过36小时。周末加班优先安排补休，补休应在两个月内休完。

## 二、休假

### 2.1 年休假

工作满一年不满十年的员工，每年享有7天年休假；满十年不满二十年的，每年12天；满二十年的，每年16天。年休假可以分两次使用，
最小单位为半天。当年未休完的年休假可以顺延至次年6月30日。

申请三天以上的年休假，应提前十个工作日在办公系统中提出，部门负责人在两个工作日内答复。

### 2.2 其他假期

| 假期种类 | 带薪天数 |
|---|---|
| 婚假 | 13天 |
| 陪产假 | 15天 |
| 丧假（直系亲属） | 3天 |
| 搬家 | 1天 |

### 2.3 病假

病假超过两天的，须提交二级以上医院的诊断证明。应在上班前一小时内通知直接主管。

## 三、差旅与报销

出差须填写出差申请单，由部门负责人批准；出省的须由分管副总经理批准。乘坐高铁以二等座为准。

- 省内出差住宿标准为每晚320元，省外为每晚450元。
- 出差伙食补贴为每天90元，不足半天的按45元计算。
- 自驾车出差按每公里1.2元补贴，过路费凭票报销。

报销单应在出差结束后20个工作日内提交财务部，逾期须书面说明原因。单笔超过5000元的报销由财务总监陆承志签字。财务部每周四付款。

## 四、薪酬与福利

工资于每月12日发放，遇节假日提前。夜班津贴为每班65元。值班电话津贴为每月200元。公司为员工缴纳五险一金，其中住房公积金
的缴存比例为10%。

每年九月公司组织一次免费体检。在公司工作满五年的员工，可以申请公司宿舍，宿舍位于柳湾路18号。

## 五、培训

新员工入职后须完成三天的安全培训，考试满分100分，80分合格。不合格者可以补考一次。特种作业人员的操作证由安全科统一保管，
到期前三个月安排复审。

员工自费取得高级技师证书的，公司一次性奖励3000元。

## 六、工作纪律

进入泵房必须穿绝缘鞋、戴安全帽，长发应盘入帽内。严禁酒后上岗，严禁在加氯间吸烟。迟到三十分钟以内的，每次扣除绩效分2分；
一个月内迟到四次的，由部门负责人面谈。

## 七、离职

员工辞职应提前30天书面通知公司，试用期内提前3天。离职前应交还门禁卡、工具和技术资料，并由部门负责人在交接单上签字。
对本手册有疑问的，可以拨打内线8016。
"""

LINJIANG_ZH = """
# 临江加压泵站调试报告

报告编号QH-R-023，2024年10月30日。

编写人：调试工程师方晓峰。审核人：设备科科长顾明远。

## 一、工程概况

临江加压泵站位于临江镇西侧，向高新区和临江镇供水，设计规模为每天1.4万立方米。

工程于2023年8月8日开工，2024年9月12日完工，总投资为2860万元。

土建施工单位为恒岳建设，电气施工单位为启明电气。

泵房内安装四台QH-200型清水泵，编号为L1至L4。

正常情况下三台运行、一台备用，其中L1和L2配有变频器。

## 二、主要设备

| 编号 | 出厂编号 | 叶轮直径 | 控制方式 |
|---|---|---|---|
| L1 | 24-0117 | 318 mm | 变频 |
| L2 | 24-0118 | 318 mm | 变频 |
| L3 | 24-0121 | 322 mm | 工频 |
| L4 | 24-0122 | 322 mm | 工频 |

出水总管为DN 600球墨铸铁管，长度为5.4公里。

为防止水锤，出水总管上装有一只容积为12立方米的气压罐。

## 三、准备工作

管道水压试验的压力为1.5 MPa，稳压一小时，压力下降0.01 MPa，合格。

管道用含氯水浸泡48小时后冲洗，10月9日取样化验，浑浊度为0.3 NTU。

---

# 四、水力性能试验

试验于2024年10月14日至18日进行，每台水泵单独连续运行六小时，水温为19 ℃。

| 编号 | 流量 | 扬程 | 轴功率 | 效率 |
|---|---|---|---|---|
| L1 | 203 m³/h | 45.6 m | 32.1 kW | 78.6 % |
| L2 | 201 m³/h | 45.2 m | 31.8 kW | 77.9 % |
| L3 | 208 m³/h | 46.0 m | 33.0 kW | 79.0 % |
| L4 | 196 m³/h | 44.7 m | 31.3 kW | 76.3 % |

四台水泵中L3的效率最高，为79.0%，均高于保证值76%。

## 4.1 振动与温度

L4的驱动端轴承振动最大，为2.6 mm/s，低于4.0 mm/s的报警值。

运行六小时后，L1的轴承温度稳定在58 ℃，L4的轴承温度稳定在63 ℃。

## 4.2 停电试验

三台水泵满负荷运行时突然断电，出水总管的最高压力为0.82 MPa。

缓闭止回阀的关闭时间调整为25秒，管道没有出现明显的水锤声。

# 五、电气与自控

泵站由两路10千伏电源供电，变压器容量为630千伏安。

备用柴油发电机在市电中断后14秒内带上负荷，油箱可供连续运行18小时。

自控系统共有112个信号点，逐点核对后发现3个接线错误，已当场改正。

# 六、遗留问题与验收

一、气压罐周围的护栏尚未安装，由恒岳建设在2024年11月20日前完成。

二、L2变频器的散热风扇噪声偏大，由启明电气在2024年12月5日前更换。

泵站于2024年10月28日通过验收，质保期为24个月。
"""


def blocks(source: str) -> Iterator[tuple[str, list[str]]]:
    """-> (kind, lines): "h1" to "h3", "list", "table", "page" or "text"."""
    for part in source.strip().split("\n\n"):
        lines = part.splitlines()
        mark = lines[0].split(" ", 1)[0]
        if set(mark) == {"#"}:
            yield f"h{len(mark)}", [lines[0].removeprefix(mark).strip()]
        elif mark == "---":
            yield "page", []
        elif mark == "-":
            yield "list", [line.removeprefix("- ") for line in lines]
        elif mark == "|":
            yield "table", [line.strip("| ") for line in lines if not line.startswith("|---")]
        else:
            yield "text", [("" if ord(lines[0][-1]) > 0x2E80 else " ").join(lines)]


def rows(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def write_docx(path: Path, source: str, author: str, language: str) -> None:
    document = Document()
    written = datetime(2025, 1, 1)
    properties = document.core_properties
    properties.author, properties.comments, properties.language = author, "", language
    properties.created = properties.modified = written
    properties.title = next(lines[0] for _, lines in blocks(source))
    for kind, lines in blocks(source):
        if kind == "table":
            cells = rows(lines)
            table = document.add_table(len(cells), len(cells[0]), style="Light Grid Accent 1")
            for row, texts in zip(table.rows, cells, strict=True):
                for cell, text in zip(row.cells, texts, strict=True):
                    cell.text = text
        elif kind == "list":
            for line in lines:
                document.add_paragraph(line, style="List Bullet")
        elif kind == "text":
            document.add_paragraph(lines[0])
        else:
            document.add_heading(lines[0], level=int(kind[1]))
    saved = io.BytesIO()
    document.save(saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():  # python-docx stamps the entries with the present time
            new.writestr(zipfile.ZipInfo(name, written.timetuple()[:6]), old.read(name), zipfile.ZIP_DEFLATED)


def write_pdf(path: Path, source: str, author: str, font: str, bold: str) -> None:
    wrap = "CJK" if font == bold else None
    body = ParagraphStyle("body", fontName=font, fontSize=10.5, leading=15.5, spaceAfter=7, wordWrap=wrap)
    heading = ParagraphStyle("heading", body, fontName=bold, spaceBefore=6, keepWithNext=True)
    sizes = {"h1": 17, "h2": 13.5, "h3": 12}
    story: list[Flowable] = []
    for kind, lines in blocks(source):
        if kind == "page":
            story.append(PageBreak())
        elif kind == "table":
            grid = [
                ("GRID", (0, 0), (-1, -1), 0.4, colors.grey),
                ("BACKGROUND", (0, 0), (-1, 0), colors.lightgrey),  # a bold first row would pass for a heading
                ("FONT", (0, 0), (-1, -1), font, 10),
            ]
            story += [Table(rows(lines), style=grid), Spacer(1, 9)]
        elif kind == "list":
            story += [Paragraph(line, body, bulletText="•") for line in lines]
        elif kind == "text":
            story.append(Paragraph(lines[0], body))
        else:
            size = sizes[kind]
            story.append(Paragraph(lines[0], ParagraphStyle(kind, heading, fontSize=size, leading=1.4 * size)))
    title = next(lines[0] for _, lines in blocks(source))
    SimpleDocTemplate(str(path), title=title, author=author, subject="Commissioning", invariant=1).build(story)


def main() -> None:
    pdfmetrics.registerFont(UnicodeCIDFont("STSong-Light"))  # not embedded: viewers use a Chinese font of their own
    northfield, qinghe = "Northfield Water Works", "清禾水务有限公司"
    write_docx(EXAMPLES / "policies/leave-and-expenses.docx", LEAVE_AND_EXPENSES, northfield, "en")
    write_docx(EXAMPLES / "zh/employee-handbook.docx", HANDBOOK_ZH, qinghe, "zh")
    write_pdf(
        EXAMPLES / "reports/millbrook-commissioning.pdf", MILLBROOK, northfield, font="Helvetica", bold="Helvetica-Bold"
    )
    write_pdf(EXAMPLES / "zh/linjiang-commissioning.pdf", LINJIANG_ZH, qinghe, font="STSong-Light", bold="STSong-Light")


if __name__ == "__main__":
    main()
